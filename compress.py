"""Compress a file with a trained BLT, and restore it to the last bit: the proof that a number of bits per byte is honest.

Reads   a file, any bytes; an output folder of llm.py or train_blt.py
Writes  FILE.blt; with --decompress FILE.blt, the file it was made of
Run     python compress.py FILE [--model checkpoints]
        python compress.py --decompress FILE.blt [--output FILE]

Arithmetic coding (the constriction library) with the model's own probabilities: a byte that the model gives probability p costs
-log2 p bits (20 at most: each id is given a millionth besides). What the model is worth is then the size of a file. Encoder and
decoder read the text by the same steps of `incremental.IncrementalBLT` and so see the very same probabilities; that holds on one machine with the
same libraries only, and the header says which (another machine may round otherwise in the last place, and a decoder would then go astray).

A large file is cut into streams that are coded side by side, a byte of each at a step: faster, but each begins without context. The cost of
that is printed. Within a stream a full row of the model begins anew with its last half, as in `training.bits_per_byte`: the bits of one
stream are the bits that function reports. On 2 CPU cores the demo's model codes 1.6 kB/s in 64 streams, which cost 0.017 bits per byte.
"""

import hashlib
import json
import math
import struct
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from blt.checks import check, check_positive
from blt.config import run_script
from blt.device import choose_device, threads_for
from blt.files import model_hash, write_atomically
from blt.ids import BOUNDARY
from blt.incremental import IncrementalBLT
from blt.metric import bits_per_byte
from save_entropy_model import load_blt

HEADER = struct.Struct(
    "<4s Q H I H 8s 4s I I"
)  # magic, bytes, streams, context_bytes, threads, model, machine, CRC-32 of the bytes, and of the header so far
MAGIC = b"BLT1"
LEAST = 2.0**-20  # what each id's probability is raised by: the coder works with multiples of 2 ** -24


@dataclass
class CompressConfig:
    POSITIONAL: ClassVar = "file"

    file: str | None = None  # what to compress
    decompress: str | None = None  # a compressed file to restore
    output: str | None = None  # where the result goes; None: FILE.blt, or what stands before .blt
    model: str = "checkpoints"  # output folder of llm.py or train_blt.py
    streams: int | None = None  # pieces that are coded side by side; None: one for every 16 kB, 64 at most
    context_bytes: int | None = None  # ids in a row of the model; None: as many as in training
    verify: bool = True  # restore the compressed file before it is written, and compare
    device: str = "auto"  # auto, cpu, cuda, cuda:1

    def __post_init__(self):
        check_positive(self, "streams")
        check(self, "context_bytes", self.context_bytes is None or 2 <= self.context_bytes < 2**32, "2 or more")
        check(self, "streams", self.streams is None or self.streams < 2**16, "below 65536")
        if (self.file is None) == (self.decompress is None):
            raise ValueError("pass either a file to compress or --decompress with one to restore")


def pieces(n_bytes, n_streams):
    """Where each stream begins and ends: nearly equal pieces, the longer ones first. 10 bytes in 3: [0, 4), [4, 7), [7, 10)."""
    lengths = np.full(n_streams, n_bytes // n_streams)
    lengths[: n_bytes % n_streams] += 1
    return np.cumsum(lengths) - lengths, lengths


def follow(model, patcher, lengths, context_bytes, code, progress=None):
    """Let streams of these lengths be read side by side while `code` says what they hold.

    code(probabilities float64 [n, 257], streams [n], place) returns the ids int32 [n] at this place of these streams: the encoder looks
    them up, the decoder decodes them. After the last byte of the last stream its end (256) is coded. Used by both, so that both compute alike.
    """
    n = len(lengths)
    reader = IncrementalBLT(model, patcher, n, context_bytes)
    logits = reader.extend(np.full((n, 1), BOUNDARY, np.int64))
    for place in range(int(lengths.max())):
        streams = np.flatnonzero(lengths > place)
        ids = np.zeros((n, 1), np.int64)
        ids[streams, 0] = code(probabilities(logits)[streams], streams, place)
        logits = reader.extend(ids, (lengths > place).astype(np.int64))
        if place + 1 == lengths[-1]:
            last = probabilities(logits)[-1:]  # the last stream is no longer than the others
        if progress is not None:
            progress.update(len(streams))
    code(last, np.array([n - 1]), int(lengths[-1]))


def probabilities(logits_BNV):
    """float64 [B, 257] of the last place of each row, as they are coded."""
    p = logits_BNV[:, -1].cpu().double().softmax(-1).numpy() + LEAST
    return p / (1 + p.shape[1] * LEAST)


def encode(model, patcher, data, n_streams, context_bytes, progress=None):
    """Code bytes. Returns the code as bytes (a multiple of 4) and the bits that the model's probabilities add up to."""
    import constriction

    if not data:
        return b"", 0.0
    text, bits = np.frombuffer(data, np.uint8), 0.0
    begins, lengths = pieces(len(text), n_streams)
    encoder, family = constriction.stream.queue.RangeEncoder(), constriction.stream.model.Categorical(perfect=False)

    def code(p, streams, place):
        nonlocal bits
        ids = np.array([text[begins[s] + place] if place < lengths[s] else BOUNDARY for s in streams], np.int32)
        encoder.encode(ids, family, p)
        bits -= np.log2(p[np.arange(len(ids)), ids]).sum()
        return ids

    follow(model, patcher, lengths, context_bytes, code, progress)
    return encoder.get_compressed().astype("<u4").tobytes(), float(bits)


def decode(model, patcher, code_bytes, n_bytes, n_streams, context_bytes, progress=None):
    """The n_bytes bytes that `encode` coded with the same model, patcher and settings."""
    import constriction

    if not n_bytes:
        return b""
    text = np.zeros(n_bytes, np.uint8)
    begins, lengths = pieces(n_bytes, n_streams)
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(code_bytes, "<u4").astype(np.uint32))
    family = constriction.stream.model.Categorical(perfect=False)

    def code(p, streams, place):
        try:
            ids = decoder.decode(family, p)
        except AssertionError:  # how constriction says that no encoder has written this
            raise ValueError("the compressed file is damaged: its code cannot come from any text") from None
        if place < lengths[streams[0]]:
            if (ids == BOUNDARY).any():
                raise ValueError("the compressed file does not fit this model: an end comes before the end")
            text[begins[streams] + place] = ids
        return ids

    follow(model, patcher, lengths, context_bytes, code, progress)
    return text.tobytes()


def model_fingerprint(model, patcher):
    """8 bytes that depend on the weights of both models and on the patch rule."""
    parts = [
        model_hash(model),
        json.dumps(asdict(model.config), sort_keys=True),
        json.dumps(patcher.config.arguments(), sort_keys=True),
    ]
    if patcher.entropy_model is not None:
        parts.append(model_hash(patcher.entropy_model))
    return hashlib.sha256("\n".join(parts).encode()).digest()[:8]


def machine_fingerprint(device):
    """(4 bytes that depend on what may round otherwise, the same in words): torch, the kind of processor, the device."""
    words = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {device.type}"
    if device.type == "cuda":
        words += f" {torch.cuda.get_device_name(device)}"
    return hashlib.sha256(words.encode()).digest()[:4], words


def compress(data, model, patcher, n_streams, context_bytes, progress=None):
    """Bytes -> a compressed file's bytes (a header of HEADER.size bytes and the code), and the bits the model accounts for."""
    device = next(model.parameters()).device
    with threads_for(n_streams):
        code, bits = encode(model, patcher, data, n_streams, context_bytes, progress)
        threads = torch.get_num_threads()
    fields = (
        MAGIC,
        len(data),
        n_streams,
        context_bytes,
        threads,
        model_fingerprint(model, patcher),
        machine_fingerprint(device)[0],
        zlib.crc32(data),
    )
    return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)[:-4])) + code, bits


def read_header(compressed):
    """(bytes, streams, context_bytes, threads, model's fingerprint, machine's, CRC-32 of the bytes) of a compressed file, or ValueError."""
    header = compressed[: HEADER.size]
    is_ours = (
        len(header) == HEADER.size and header[:4] == MAGIC and zlib.crc32(header[:-4]) == HEADER.unpack(header)[-1]
    )
    if not is_ours or (len(compressed) - HEADER.size) % 4:
        raise ValueError("this is no file that compress.py wrote, or a part of one, or it is damaged")
    return HEADER.unpack(header)[1:-1]


def decompress(compressed, model, patcher, progress=None):
    """The bytes that `compress` was given. Raises ValueError for a file of another model or machine, or a damaged one."""
    n_bytes, n_streams, context_bytes, threads, model_print, machine_print, checksum = read_header(compressed)
    here, words = machine_fingerprint(next(model.parameters()).device)
    if model_print != model_fingerprint(model, patcher):
        raise ValueError(
            "the file was compressed with another model, entropy model or patch rule; pass the folder of that one as --model"
        )
    if machine_print != here:
        raise ValueError(
            f"the file was compressed on another kind of machine than this one ({words}), whose probabilities may differ in the last digit"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # sums may be split otherwise among other numbers of threads
    try:
        data = decode(model, patcher, compressed[HEADER.size :], n_bytes, n_streams, context_bytes, progress)
    finally:
        torch.set_num_threads(before)
    if zlib.crc32(data) != checksum:
        raise ValueError(
            "the restored bytes are not those that were compressed: the file is damaged, or this machine computes otherwise"
        )
    return data


def read(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a file")
    return path.read_bytes()


def bar(n_bytes, what):
    return tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, disable=None, dynamic_ncols=True)


def main(config):
    device = choose_device(config.device)
    data = read(config.file or config.decompress)
    model, patcher, record = load_blt(config.model, device)
    patcher.precision = "fp32"
    if config.decompress:
        name = config.decompress
        output = config.output or (name.removesuffix(".blt") if name.endswith(".blt") else f"{name}.restored")
        if Path(output).exists() and config.output is None:
            raise ValueError(f"{output} exists; say with --output where the restored file is to go")
        tick = time.perf_counter()
        with bar(read_header(data)[0], "restoring") as progress:
            restored = decompress(data, model, patcher, progress)
        write_atomically(output, lambda temporary: Path(temporary).write_bytes(restored))
        seconds = time.perf_counter() - tick
        print(
            f"restored {len(restored):,} bytes in {seconds:.1f} s, {len(restored) / seconds / 1e3:.2f} kB/s; checksum right"
        )
        print(f"wrote {output}")
        return
    context = config.context_bytes or record.settings["row_bytes"]
    n_streams = min(config.streams or min(64, math.ceil(len(data) / 16384)), max(1, len(data)))
    tick = time.perf_counter()
    with bar(len(data), "compressing") as progress:
        compressed, bits = compress(data, model, patcher, max(1, n_streams), context, progress)
    seconds = time.perf_counter() - tick
    if config.verify:
        with bar(len(data), "verifying") as progress:
            if decompress(compressed, model, patcher, progress) != data:
                raise ValueError("the compressed file does not restore the bytes; nothing was written")
    output = config.output or f"{config.file}.blt"
    write_atomically(output, lambda temporary: Path(temporary).write_bytes(compressed))
    n = max(1, len(data))
    print(
        f"{len(data):,} bytes to {len(compressed):,}, header {HEADER.size} | {8 * len(compressed) / n:.4f} bits per byte on disk, {bits / n:.4f} by the model's probabilities"
    )
    if n_streams > 1:
        whole = bits_per_byte(model, patcher, [data], context)
        print(
            f"{n_streams} streams side by side cost {bits / n - whole:+.4f} bits per byte (in one stream {whole:.4f})"
        )
    print(
        f"{seconds:.1f} s, {len(data) / seconds / 1e3:.2f} kB/s"
        + ("; restored and compared" if config.verify else "; not restored (--no_verify)")
    )
    print(f"wrote {output}\nnext: python compress.py --decompress {output} --model {config.model}")


if __name__ == "__main__":
    run_script(main, CompressConfig, __doc__)
