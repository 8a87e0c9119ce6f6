"""Spelling and editing tasks, fine-tuning on them, and the share of answers that are right to the last byte.

An item is (task, question, answer). Its document is

    TASK: QUESTION
    ANSWER

and a model that is fine-tuned on such documents must write the answer and then end the document. An
answer is right if each of its ids, and the document's end, is the most likely one: then a model that
always writes the most likely id writes this answer. (For a BPE model that is the tokenisation of the
document; another spelling of the same bytes counts as wrong.)

Items whose number is divisible by TEST_EVERY are held out. The lists of CUTE have the same word in the
same place in many tasks, and so a word of the test is in no training item of these.
"""

import csv
import random

import numpy as np

from blt.checks import check_packages
from blt.ids import to_bytes
from blt.loop import fit
from blt.metric import predicts_document_ends, score_batches, scoring_batches, vocabulary_of
from blt.rows import BitArray, DocumentStream, TrainingRows, target_positions

TEST_EVERY = 5
# Words of the spelling set: the most frequent ones of at least this many letters.
WORDS = 5000
SHORTEST = 4
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


# Items


def read_cute(folder):
    """Items of the CUTE benchmark from its tab-separated files: [(task, question, answer, number)].

    Raises ValueError if the folder has none.
    """
    items = []
    for path in sorted(folder.glob("*.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if not rows or "label" not in rows[0]:
            raise ValueError(f"{path} is no task of CUTE: its first line must name the columns input1 ... and label")
        for number, row in enumerate(rows):
            inputs = [value for name, value in row.items() if name != "label" and value is not None]
            items.append((path.stem, " | ".join(inputs), row["label"], number))
    if not items:
        raise ValueError(f"{folder} holds no .tsv files; pass the folder of the CUTE benchmark as --cute_folder")
    return items


def frequent_words(n=WORDS):
    """The n most frequent English words of letters alone, by the package wordfreq."""
    check_packages("wordfreq")
    from wordfreq import top_n_list

    words = [word for word in top_n_list("en", 4 * n) if word.isascii() and word.isalpha() and len(word) >= SHORTEST]
    return words[:n]


def spelling_items(words, seed=0):
    """Items of six tasks for each word: spell it, write it backwards, insert, delete, replace or swap letters."""
    draw = random.Random(seed)
    items = []
    for number, word in enumerate(words):
        at = draw.randrange(len(word))
        old = word[at]
        new = draw.choice([letter for letter in ALPHABET if letter not in word])
        first, second = draw.sample(sorted(set(word)), 2) if len(set(word)) > 1 else (old, old)
        swapped = word.translate(str.maketrans(first + second, second + first))
        answers = {
            "spell": (word, " ".join(word)),
            "backwards": (word, word[::-1]),
            "insert": (f"{word} | {new} after {old}", word.replace(old, old + new)),
            "delete": (f"{word} | {old}", word.replace(old, "")),
            "replace": (f"{word} | {old} by {new}", word.replace(old, new)),
            "swap": (f"{word} | {first} and {second}", swapped),
        }
        items += [(task, question, answer, number) for task, (question, answer) in answers.items()]
    return items


def split_items(items):
    """(training items, test items), by their numbers."""
    training = [item for item in items if item[3] % TEST_EVERY]
    test = [item for item in items if item[3] % TEST_EVERY == 0]
    return training, test


def document_of(item):
    """(document, bytes before the answer) of an item."""
    task, question, answer, _ = item
    head = to_bytes(f"{task}: {question}\n")
    return np.concatenate([head, to_bytes(answer)]), len(head)


# Fine-tuning


def starts_of(patcher, documents):
    """Patch starts of each document, bool [N + 1]; None for a model without patches."""
    if patcher is None:
        return None
    entropies = [None] * len(documents)
    if patcher.config.needs_entropies:
        # All at once, because one short text after the other takes many times as long.
        entropies = patcher.entropies_with_end(documents)
    return [patcher.starts(document, of_document) for document, of_document in zip(documents, entropies)]


def training_rows(documents, starts, vocabulary, row_bytes):
    """`TrainingRows` of documents in memory, in a vocabulary's ids. starts: what `starts_of` returned."""
    stream = DocumentStream.of_documents([vocabulary.encode(document) for document in documents], vocabulary)
    is_start = None
    if starts is not None:
        is_start = BitArray()
        # The stream begins with a boundary, which is a patch of its own.
        is_start.append(np.concatenate([[True], *starts]))
        is_start.close()
    return TrainingRows(stream, vocabulary.row_ids(row_bytes), is_start)


def fine_tune(model, patcher, items, config, row_bytes, out_dir):
    """Train a model on the items' documents; the last weights are in the model afterwards."""
    documents = [document_of(item)[0] for item in items]
    order = np.random.default_rng(config.seed).permutation(len(documents))
    documents = [documents[number] for number in order]
    vocabulary = vocabulary_of(model)
    rows = training_rows(documents, starts_of(patcher, documents), vocabulary, row_bytes)
    some = documents[:50]
    batches = list(scoring_batches(model, some, starts_of(patcher, some), row_bytes, config.batch_rows))
    return fit(model, config, rows, batches, out_dir)


def exact_answers(model, patcher, items, row_bytes, batch_rows=8, precision="fp32"):
    """Which items a model answers right to the last byte: bool [items]."""
    if not predicts_document_ends(model):
        raise ValueError("a model that cannot end a document has no answers")
    documents_and_heads = [document_of(item) for item in items]
    documents = [document for document, _ in documents_and_heads]
    head_bytes = np.array([head for _, head in documents_and_heads])
    vocabulary = vocabulary_of(model)
    is_exact = np.ones(len(items), dtype=bool)
    device = next(model.parameters()).device
    batches = scoring_batches(model, documents, starts_of(patcher, documents), row_bytes, batch_rows)
    for batch, _, is_right_BT in score_batches(model, batches, device, precision):
        is_scored_BT = batch.is_scored.cpu().numpy()
        document_BT, context_BT = target_positions(batch, vocabulary)
        bytes_BT = vocabulary.bytes_of_id[batch.ids[:, 1:].cpu().numpy()]
        # A token that begins in the question and ends in the answer belongs to the answer. So does the
        # document's end, which has no bytes.
        head_BT = head_bytes[document_BT]
        is_answer_BT = is_scored_BT & ((context_BT + bytes_BT > head_BT) | (context_BT >= head_BT))
        wrong = is_answer_BT & ~is_right_BT.cpu().numpy()
        is_exact[document_BT[wrong]] = False
    return is_exact


def accuracy_by_task(items, is_exact):
    """{task: share of right answers}, and "all": the mean of the tasks."""
    by_task = {}
    for item, right in zip(items, is_exact):
        by_task.setdefault(item[0], []).append(bool(right))
    accuracy = {task: sum(rights) / len(rights) for task, rights in sorted(by_task.items())}
    return {**accuracy, "all": sum(accuracy.values()) / len(accuracy)}
