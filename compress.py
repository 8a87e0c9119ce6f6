"""Compress a file with a trained BLT, and restore it exactly: the proof that the bits per byte are real.

Reads   a file, any bytes; an output folder of llm.py or train_blt.py
Writes  FILE.blt; with --decompress FILE.blt, the file it was made of
Run     python compress.py FILE [--model checkpoints]
        python compress.py --decompress FILE.blt [--output FILE]
Takes   10 minutes a megabyte, each way, with the demo's model in 64 streams on 2 cores of an AMD EPYC

Arithmetic coding (the constriction library) by the model's probabilities: a byte of probability p costs
-log2 p bits, and at most 20, because every probability is raised by a millionth. The compressed size is
the bits-per-byte figure; a model that saw the future could not be decoded.

Encoder and decoder read the text by the same steps of `IncrementalBLT`, so both compute the same
probabilities to the last digit. This holds on one kind of machine with the same libraries only: another
one may round differently, and its decoder would go astray. The header names the model and the kind of
machine, and the script refuses a file of another one.

A large file is split into streams that are coded side by side, one byte of each at a step. That is
faster, but each stream begins without context; the script prints what that costs (120 kB in 64 streams
with the demo's model: 0.017 bits per byte). Within a stream a full row of the model restarts with its
last half, as in `metric.bits_per_byte`: a file in one stream has the bits that this function reports.

A file that the model cannot predict (noise, a compressed file, another language) would have a code that
is larger than the file. It is stored instead: its bytes as they are, after the header, so that no file
grows by more than the header's 41 bytes. A stored file is checked in the same way, but it is restored
without a model and on any machine.
"""

import hashlib
import json
import math
import os
import struct
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from blt.checks import check, check_output, check_packages, check_positive
from blt.commands import command
from blt.config import run_script
from blt.device import choose_device, threads_for, what_triton_lacks
from blt.files import model_hash, write_atomically
from blt.ids import BOUNDARY
from blt.incremental import IncrementalBLT
from blt.metric import bits_per_byte
from blt.progress import progress_bar
from save_entropy_model import load_blt

try:
    import constriction
except ImportError:
    # `check_packages` says what to install; --help and stored files do without it.
    constriction = None

# The magic number, the fields of `Header` in their order, and the CRC-32 of all that and of the content.
HEADER = struct.Struct("<4s ? Q I H I H 8s 4s I")
MAGIC = b"BLT3"
# BLT1 had no stored files; the CRC-32 of BLT2 did not cover the content, so that it could have a tail.
OLD_MAGICS = (b"BLT1", b"BLT2")

# Every probability is raised by this. The coder works with multiples of 2 ** -24, and none may be zero.
LEAST = 2.0**-20

# No byte costs less than this, because a probability is at most (1 + LEAST) / (1 + 257 * LEAST).
LEAST_BITS = math.log2((1 + 257 * LEAST) / (1 + LEAST))

# Each stream takes memory, also for a file that only claims to have this many.
MAX_STREAMS = 4096

# What every stream reads before a file, to see whether two machines compute alike.
PROBE = b"The 24 bytes of a probe."

# The default: streams long enough that what they lose at their beginnings is little.
STREAM_BYTES = 16384
MAX_DEFAULT_STREAMS = 64


@dataclass
class CompressConfig:
    POSITIONAL: ClassVar = "file"

    file: str | None = None  # what to compress
    decompress: str | None = None  # a compressed file to restore
    output: str | None = None  # where the result goes; None: FILE.blt, or the name without .blt
    model: str = "checkpoints"  # output folder of llm.py or train_blt.py; stored files need none
    streams: int | None = None  # pieces that are coded side by side; None: one for every 16 kB, 64 at most
    context_bytes: int | None = None  # ids in a row of the model; None: as many as in training
    verify: bool = True  # restore the compressed file before it is written, and compare
    device: str = "auto"  # auto, cpu, cuda, cuda:1

    def __post_init__(self):
        check_positive(self, "streams")
        check(self, "context_bytes", self.context_bytes is None or 2 <= self.context_bytes < 2**32, "2 or more")
        check(self, "streams", self.streams is None or self.streams <= MAX_STREAMS, f"at most {MAX_STREAMS}")
        if (self.file is None) == (self.decompress is None):
            raise ValueError("pass either a file to compress or --decompress with one to restore")


# ------------------------------------------------------------------------------- arithmetic coding


def stream_count(n_bytes, n_streams=None):
    """How many streams n_bytes bytes get: as many as asked for, but no empty one. None: the default."""
    if n_streams is None:
        n_streams = min(MAX_DEFAULT_STREAMS, math.ceil(n_bytes / STREAM_BYTES))
    return max(1, min(n_streams, n_bytes))


def stream_ranges(n_bytes, n_streams):
    """Where each stream begins, and its length: nearly equal pieces, the longer ones first.

    Example: 10 bytes in 3 streams give begins 0, 4, 7 and lengths 4, 3, 3.
    """
    lengths = np.full(n_streams, n_bytes // n_streams)
    # The longer ones first: the last stream is then one of the shortest, see `read_streams`.
    lengths[: n_bytes % n_streams] += 1
    return np.cumsum(lengths) - lengths, lengths


def probabilities(logits_BNV):
    """The distribution after each row's last id, as it is coded: float64 [B, 257], nowhere zero."""
    p_BV = logits_BNV[:, -1].cpu().double().softmax(-1).numpy() + LEAST
    return p_BV / (1 + p_BV.shape[1] * LEAST)


def read_streams(model, patcher, lengths, context_bytes, code_ids, progress=None):
    """Read streams of these lengths side by side, where `code_ids` says what they hold.

    code_ids(p_SV, streams, position) gets the probabilities float64 [S, 257] of the ids at this position
    of S streams, and the numbers of these streams. It returns the ids, int32 [S]: the encoder looks them
    up and encodes them, the decoder decodes them. Both run this function, so that both compute alike.
    """
    n_streams = len(lengths)
    reader = IncrementalBLT(model, patcher, n_streams, context_bytes)
    # To the model each stream is a document of its own, so each begins with a boundary.
    logits_BNV = reader.extend(np.full((n_streams, 1), BOUNDARY, np.int64))
    for position in range(int(lengths.max())):
        is_open_B = lengths > position
        streams = np.flatnonzero(is_open_B)
        ids_BN = np.zeros((n_streams, 1), np.int64)
        ids_BN[streams, 0] = code_ids(probabilities(logits_BNV)[streams], streams, position)
        logits_BNV = reader.extend(ids_BN, is_open_B.astype(np.int64))
        # The last stream is one of the shortest. Others may have one more byte, so its end comes later.
        if position + 1 == lengths[-1]:
            end_p_SV = probabilities(logits_BNV)[-1:]
        if progress is not None:
            progress.update(len(streams))
    # The decoder knows the lengths. The end of the last stream is coded nevertheless, because the bits
    # per byte that the project reports include the document's end.
    code_ids(end_p_SV, np.array([n_streams - 1]), int(lengths[-1]))


def encode(model, patcher, data, n_streams, context_bytes, progress=None):
    """Code bytes. Returns the code, in 4-byte words, and the bits that the probabilities add up to."""
    # An empty file has no stream, and its header says all about it.
    if not data:
        return b"", 0.0
    text = np.frombuffer(data, np.uint8)
    begins, lengths = stream_ranges(len(text), n_streams)
    encoder = constriction.stream.queue.RangeEncoder()
    # perfect=False: the fast approximation of the probabilities, which is the same for the decoder.
    family = constriction.stream.model.Categorical(perfect=False)
    bits = 0.0

    def encode_ids(p_SV, streams, position):
        nonlocal bits
        is_end = position == lengths[streams[0]]
        if is_end:
            ids_S = np.array([BOUNDARY], np.int32)
        else:
            ids_S = text[begins[streams] + position].astype(np.int32)
        encoder.encode(ids_S, family, p_SV)
        bits -= np.log2(p_SV[np.arange(len(ids_S)), ids_S]).sum()
        return ids_S

    read_streams(model, patcher, lengths, context_bytes, encode_ids, progress)
    return encoder.get_compressed().astype("<u4").tobytes(), float(bits)


def decode(model, patcher, code, n_bytes, n_streams, context_bytes, progress=None):
    """The n_bytes bytes that `encode` has coded with the same model, patcher and settings.

    Raises ValueError for a code that comes from no text, or from another model.
    """
    if n_bytes == 0:
        return b""
    # By what the code can hold, before memory is taken. 1% more, because the coder rounds probabilities.
    most_bits = 8 * len(code) * 1.01 + 128
    longer = ValueError("the compressed file is damaged: it says that it holds more bytes than its code can")
    if n_bytes * LEAST_BITS > most_bits:
        raise longer
    text = np.zeros(n_bytes, np.uint8)
    begins, lengths = stream_ranges(n_bytes, n_streams)
    bits = 0.0
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(code, "<u4").astype(np.uint32))
    family = constriction.stream.model.Categorical(perfect=False)

    def decode_ids(p_SV, streams, position):
        nonlocal bits
        try:
            ids_S = decoder.decode(family, p_SV)
        except AssertionError:
            # This is how constriction says that no encoder has written the code.
            message = "the compressed file is damaged: its code cannot come from any text"
            raise ValueError(message) from None
        # Beyond its end a code goes on with zeros, for as many bytes as the header says.
        bits -= np.log2(p_SV[np.arange(len(ids_S)), ids_S]).sum()
        if bits > most_bits:
            raise longer
        is_end = position == lengths[streams[0]]
        if not is_end:
            if (ids_S == BOUNDARY).any():
                raise ValueError("the compressed file does not fit this model: a stream ends too early")
            text[begins[streams] + position] = ids_S
        return ids_S

    read_streams(model, patcher, lengths, context_bytes, decode_ids, progress)
    return text.tobytes()


# -------------------------------------------------------------------------------- compressed files


@dataclass
class Header:
    """What a compressed file says about itself. The fields from n_streams on are zero in a stored file."""

    is_stored: bool  # the content is the file's bytes; else it is their code
    n_bytes: int  # of the file
    checksum: int  # CRC-32 of the file's bytes
    n_streams: int = 0
    context_bytes: int = 0
    threads: int = 0  # CPU threads in use: another number of them may add in another order
    model: bytes = bytes(8)  # fingerprint of the models and the patch rule
    machine: bytes = bytes(4)  # fingerprint of what may round differently

    def pack(self, content=b""):
        """The header of a file with this content, as HEADER.size bytes."""
        # vars() has the fields in their order, which is that of HEADER.
        without_checksum = HEADER.pack(MAGIC, *vars(self).values(), 0)[:-4]
        return without_checksum + struct.pack("<I", zlib.crc32(content, zlib.crc32(without_checksum)))


def read_header(compressed):
    """The `Header` of a compressed file. Raises ValueError for other files, parts of one and damaged ones."""
    packed = compressed[: HEADER.size]
    if packed[:4] in OLD_MAGICS:
        raise ValueError(
            f"an older compress.py wrote this file, in format {packed[:4].decode()}; this one reads BLT3: "
            "restore it with the version that wrote it, and compress it again"
        )
    damaged = ValueError("this is no file that compress.py wrote, or a part of one, or it is damaged or too long")
    if len(packed) < HEADER.size or packed[:4] != MAGIC:
        raise damaged
    _, *fields, header_checksum = HEADER.unpack(packed)
    # Of the content too: a cut, changed or longer file is noticed before anything is decoded.
    if header_checksum != zlib.crc32(memoryview(compressed)[HEADER.size :], zlib.crc32(packed[:-4])):
        raise damaged
    header = Header(*fields)
    content_bytes = len(compressed) - HEADER.size
    # The length of stored bytes is known. That of a code is not, but it consists of 4-byte words.
    has_right_size = content_bytes == header.n_bytes if header.is_stored else content_bytes % 4 == 0
    if not has_right_size:
        raise damaged
    return header


def model_fingerprint(model, patcher):
    """8 bytes that depend on the weights of both models and on the patch rule."""
    # By content and not by path: a copy of the model's folder restores the file as well.
    parts = [
        model_hash(model),
        json.dumps(asdict(model.config), sort_keys=True),
        json.dumps(patcher.config.arguments(), sort_keys=True),
    ]
    if patcher.entropy_model is not None:
        parts.append(model_hash(patcher.entropy_model))
    return hashlib.sha256("\n".join(parts).encode()).digest()[:8]


def machine_fingerprint(model, patcher, n_streams, context_bytes):
    """4 bytes for what may round differently (torch, processor, device, libraries), and the same in words."""
    device = next(model.parameters()).device
    words = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {device.type}"
    if device.type == "cuda":
        words += f" {torch.cuda.get_device_name(device)}"
    digest = hashlib.sha256(words.encode())
    # Libraries choose their code by more than torch tells. So the models read a short text as they will
    # read the file, with as many streams and threads; most differences show in its probabilities.
    reader = IncrementalBLT(model, patcher, n_streams, context_bytes)
    for number in (BOUNDARY, *PROBE):
        logits_BNV = reader.extend(np.full((n_streams, 1), number, np.int64))
        digest.update(probabilities(logits_BNV).tobytes())
    return digest.digest()[:4], words


def check_device(model):
    """Raise ValueError if the model's device may compute other probabilities when a file is restored."""
    device = next(model.parameters()).device
    if device.type == "cuda" and what_triton_lacks() is not None:
        # Without the kernels a GPU sums a patch's bytes in an order that is open.
        raise ValueError(f"on CUDA this needs {what_triton_lacks()}; install it, or use --device cpu")


def compress(data, model, patcher, n_streams, context_bytes, progress=None):
    """Compress bytes. Returns the compressed file's bytes, and the bits by the model's probabilities.

    The file is a header of HEADER.size bytes and the code, or the bytes themselves if their code is not
    smaller. So it has at most len(data) + HEADER.size bytes. In both cases the bits are those of the code.

    n_streams: streams that are coded side by side; one a byte at most.
    context_bytes: ids in a row of the model, see `IncrementalBLT`.
    """
    check_device(model)
    n_streams = stream_count(len(data), n_streams)
    # The bytes are coded in any case: only that shows whether their code is smaller.
    with threads_for(n_streams):
        code, bits = encode(model, patcher, data, n_streams, context_bytes, progress)
        header = Header(is_stored=len(code) >= len(data), n_bytes=len(data), checksum=zlib.crc32(data))
        if header.is_stored:
            return header.pack(data) + data, bits
        header.n_streams = n_streams
        header.context_bytes = context_bytes
        header.threads = torch.get_num_threads()
        header.model = model_fingerprint(model, patcher)
        header.machine, _ = machine_fingerprint(model, patcher, n_streams, context_bytes)
    return header.pack(code) + code, bits


def decompress(compressed, model, patcher, progress=None):
    """The bytes that `compress` was given.

    A stored file needs no model: model and patcher may be None. Raises ValueError for a damaged file, and
    for a coded file of another model or another kind of machine.
    """
    header = read_header(compressed)
    content = compressed[HEADER.size :]
    if header.is_stored:
        data = bytes(content)
        if progress is not None:
            progress.update(len(data))
    else:
        check_device(model)
        data = decode_file(header, content, model, patcher, progress)
    if zlib.crc32(data) != header.checksum:
        raise ValueError(
            "the restored bytes are not those that were compressed: "
            "the file is damaged, or this machine computes differently"
        )
    return data


def decode_file(header, code, model, patcher, progress=None):
    """The bytes of a coded file. Raises ValueError if another model or kind of machine has coded it."""
    # A checksum keeps nobody from writing such numbers, and what follows takes memory by them.
    is_possible = (
        1 <= header.n_streams <= min(header.n_bytes, MAX_STREAMS) and header.context_bytes >= 2 and header.threads >= 1
    )
    if not is_possible:
        raise ValueError("the compressed file is damaged: compress.py writes no such header")
    # More threads than processors wait for each other, and a file could ask for thousands.
    processors = max(os.cpu_count() or 1, torch.get_num_threads())
    if header.threads > processors:
        raise ValueError(
            f"the file was compressed with {header.threads} threads on another kind of machine than this one, "
            f"which has {processors} processors; restore it where it was made"
        )
    if header.model != model_fingerprint(model, patcher):
        raise ValueError(
            "the file was compressed with another model, entropy model or patch rule; "
            "pass the folder of that one as --model"
        )
    # The encoder's number of threads: sums over other parts could differ in the last digit.
    threads_before = torch.get_num_threads()
    torch.set_num_threads(header.threads)
    try:
        machine, machine_words = machine_fingerprint(model, patcher, header.n_streams, header.context_bytes)
        if header.machine != machine:
            raise ValueError(
                f"the file was compressed on another kind of machine than this one ({machine_words}), or with "
                "other libraries, whose probabilities differ in the last digit; restore it where it was made"
            )
        sizes = (header.n_bytes, header.n_streams, header.context_bytes)
        return decode(model, patcher, code, *sizes, progress)
    finally:
        torch.set_num_threads(threads_before)


# -------------------------------------------------------------------------------- the command line


def read_file(path):
    """The bytes of a file. Raises FileNotFoundError if there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a file")
    return path.read_bytes()


def read_start(path):
    """The first bytes of a file, as many as a header has."""
    with open(path, "rb") as file:
        return file.read(HEADER.size)


def write_file(path, data):
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def load_model(config):
    """(BLT, patcher, record) of --model."""
    model, patcher, record = load_blt(config.model, choose_device(config.device))
    # For `bits_per_byte`, whose patches must be the coder's; the coder itself always computes in fp32.
    patcher.precision = "fp32"
    return model, patcher, record


def files_of(folder):
    """The files in a model's folder, which no result may replace."""
    return sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []


def compress_file(config):
    """Compress config.file, print sizes and bits per byte, and write the result."""
    output = f"{config.file}.blt" if config.output is None else config.output
    check_output(output, reads=[config.file, *files_of(config.model)])
    # Only a name that the user has given may replace a file that this script has not written.
    if config.output is None and Path(output).exists() and read_start(output)[:3] != MAGIC[:3]:
        raise ValueError(f"{output} exists, and compress.py has not written it; name another one: --output")
    check_packages("constriction")
    data = read_file(config.file)
    model, patcher, record = load_model(config)
    context_bytes = record.row_bytes() if config.context_bytes is None else config.context_bytes
    n_streams = stream_count(len(data), config.streams)
    started = time.perf_counter()
    with progress_bar(len(data), "compressing") as progress:
        compressed, bits = compress(data, model, patcher, n_streams, context_bytes, progress)
    seconds = time.perf_counter() - started
    # Before anything is written: a file that cannot be restored is worthless.
    if config.verify:
        with progress_bar(len(data), "verifying") as progress:
            restored = decompress(compressed, model, patcher, progress)
        if restored != data:
            raise ValueError("the compressed file does not restore the bytes; nothing was written")
    write_file(output, compressed)

    print_sizes(data, compressed, bits)
    if n_streams > 1:
        # The model may do better than the code shows, so this is printed for a stored file as well.
        bpb = bits_per_byte(model, patcher, [data], context_bytes)
        cost = bits / len(data) - bpb
        print(f"{n_streams} streams side by side cost {cost:+.4f} bits per byte (in one stream {bpb:.4f})")
    verified = "restored and compared" if config.verify else "not restored (--no_verify)"
    print(f"{seconds:.1f} s, {len(data) / seconds / 1e3:.2f} kB/s; {verified}")
    print(f"wrote {output}")
    flags = {"decompress": output}
    if not read_header(compressed).is_stored:
        flags["model"] = config.model
        if config.device != "auto":
            flags["device"] = config.device
    # The file itself has the name that the restored one would get.
    flags["output"] = f"{config.file}.restored"
    print("next: " + command("compress.py", **flags))


def print_sizes(data, compressed, bits):
    """Print the bits per byte on disk, and by the model's probabilities: they differ in a stored file."""
    n_bytes = max(1, len(data))
    sizes = f"{len(data):,} bytes to {len(compressed):,}, header {HEADER.size}"
    on_disk = f"{8 * len(compressed) / n_bytes:.4f} bits per byte on disk"
    print(f"{sizes} | {on_disk}, {bits / n_bytes:.4f} by the model's probabilities")
    if read_header(compressed).is_stored:
        code_bytes = f"{bits / 8:,.0f} bytes by the model's probabilities"
        print(f"stored as it is, because its code would not be smaller: {code_bytes}")


def decompress_file(config):
    """Restore config.decompress, and write the result."""
    name = config.decompress
    compressed = read_file(name)
    output = config.output
    if output is None:
        output = name.removesuffix(".blt") if name.endswith(".blt") else f"{name}.restored"
    check_output(output, reads=[name, *files_of(config.model)])
    # Only a name that the user has given may replace a file.
    if Path(output).exists() and config.output is None:
        raise ValueError(f"{output} exists; say with --output where the restored file is to go")
    header = read_header(compressed)
    model, patcher = None, None
    if not header.is_stored:
        check_packages("constriction")
        model, patcher, _ = load_model(config)
    started = time.perf_counter()
    with progress_bar(header.n_bytes, "restoring") as progress:
        restored = decompress(compressed, model, patcher, progress)
    write_file(output, restored)
    seconds = time.perf_counter() - started
    how = "stored, no model used" if header.is_stored else f"{len(restored) / seconds / 1e3:.2f} kB/s"
    print(f"restored {len(restored):,} bytes in {seconds:.1f} s, {how}; checksum right")
    print(f"wrote {output}")


def main(config):
    if config.decompress is not None:
        decompress_file(config)
    else:
        compress_file(config)


if __name__ == "__main__":
    run_script(main, CompressConfig, __doc__)
