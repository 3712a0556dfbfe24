#!/usr/bin/env python3
"""Writes the weights of a PyTorch checkpoint (.pth, .pt, .bin, .pth.tar) as a safetensors file, which Mesa reads.

A .pth file is a pickle, and a pickle may ask for any code to be run. This program runs none of it: it knows the few names that a checkpoint
of weights needs (KNOWN), each replaced by a stand-in of its own, and refuses a file that asks for any other, with that name. Python 3.8 or
newer is enough; neither PyTorch nor NumPy is needed.

    tools/pth_to_safetensors.py deit_tiny_patch16_224-a1311bcf.pth deit_tiny.safetensors
    mesa-eval deit_tiny.safetensors --config deit_ti.yaml --data /imagenet
    mesa-train --config deit_ti.yaml --weights deit_tiny.safetensors

The weights are looked for under the usual keys (model, state_dict; with --ema model_ema, state_dict_ema; or --key), else the file itself is
the table of weights. Prefixes of wrappers (module., _orig_mod., model.) go
where all names have them. Tensors keep their element types; views of shared or strided storages
become tensors of their own. Exit codes: 0 done; 1 the file was refused or cannot be read; 2 wrong usage.
"""
import argparse
import io
import itertools
import json
import os
import pickle
import re
import struct
import sys
import tempfile
import zipfile

# Name of PyTorch's storage class: safetensors' element type, and bytes of a value.
STORAGES = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}
WEIGHT_KEYS = ("model", "state_dict", "module", "net")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError, struct.error)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What a file may make of views that repeat their storage, over its own size: a few bytes must not become a full disk.
MOST_EXPANSION, MOST_EXTRA_BYTES = 4, 256 << 20
MOST_AXES, MOST_PAIRS = 8, 1 << 20  # of a tensor; given to all the tables that a pickle makes of lists


class Refused(Exception):
    """The file cannot be converted; the text says why."""


def shown(value):
    """A name or message that the file may have chosen, fit for a terminal: quoted, nothing but printable ASCII, not too long."""
    if type(value) is int and value.bit_length() > 64:
        return "a long number"
    text = ascii(value if type(value) in (str, int, bool, float, type(None)) else str(value))
    return text if len(text) <= 200 else text[:200] + "..."


def check_keys(keys):
    """Tables of weights have names for keys. Other keys are refused: to hash tuples that hold tuples can take for ever."""
    if not all(type(key) in (str, int, bool, float, type(None)) for key in keys):
        raise Refused("a table with keys that are neither text nor numbers")


class Frozen(type):
    """Classes that nobody, in particular no pickle, gives other attributes."""

    def __setattr__(cls, name, value):
        raise Refused("the pickle tries to change a class")


class Table(dict, metaclass=Frozen):
    """Stands for collections.OrderedDict; what else the pickle would attach to one (state_dict's _metadata) is dropped."""

    __slots__ = ()
    pairs_left = [MOST_PAIRS]  # the same list may be given again and again: each byte of a pickle would copy all of it

    def __init__(self, pairs=()):
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        if not (isinstance(pairs, (list, tuple)) or type(pairs) is type({}.items())):
            raise Refused("a table of something else than pairs")
        self.pairs_left[0] -= len(pairs)
        if self.pairs_left[0] < 0:
            raise Refused(f"its tables are made of more than {MOST_PAIRS} pairs")
        for pair in pairs:
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
                raise Refused("a table of something else than pairs")
            check_keys(pair[:1])
            self[pair[0]] = pair[1]

    def __setstate__(self, state):
        pass


class Inert(metaclass=Frozen):
    """Stands for what a checkpoint carries beside its weights, such as the arguments of its training: holds nothing, does nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class StorageType(metaclass=Frozen):
    """torch.FloatStorage and the like: not to be called, only named."""

    __slots__ = ("dtype", "size")

    def __init__(self, dtype, size):
        self.dtype, self.size = dtype, size

    def __setstate__(self, state):
        raise Refused("the pickle tries to change a type of storage")


class Storage(metaclass=Frozen):
    """`numel` values that lie at `read()`; read when they are needed."""

    __slots__ = ("type", "numel", "read")

    def __init__(self, storage_type, numel, read):
        self.type, self.numel, self.read = storage_type, numel, read

    def __setstate__(self, state):
        raise Refused("the pickle tries to change a storage")


def is_count(x):
    return type(x) is int and 0 <= x < 1 << 63


def as_axes(shape):
    if not (isinstance(shape, (list, tuple)) and len(shape) <= MOST_AXES and all(map(is_count, shape))):
        raise Refused(f"a tensor whose shape or strides are not up to {MOST_AXES} counts")
    return tuple(shape)


class Tensor(metaclass=Frozen):
    """Values of a storage: element (i, j, ...) lies at offset + i stride[0] + j stride[1] + ..."""

    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage, offset, shape, stride):
        if not isinstance(storage, Storage):
            raise Refused("a tensor without a storage")
        shape, stride = as_axes(shape), as_axes(stride)
        if not (is_count(offset) and len(shape) == len(stride)):
            raise Refused("a tensor whose shape, strides or offset are no counts")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride))
        if self.numel() > 0 and last >= storage.numel:
            raise Refused(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.numel} values")

    def __setstate__(self, state):
        pass  # attributes that somebody attached

    def numel(self):
        count = 1
        for n in self.shape:
            count *= n
        return count

    def bytes(self):
        return self.numel() * self.storage.type.size

    def data(self):
        """The values in row-major order; takes the memory of the storage and of the result."""
        if self.numel() == 0:
            return b""
        size = self.storage.type.size
        source = memoryview(self.storage.read())
        if len(source) < self.storage.numel * size:
            raise Refused("the values of a tensor are truncated")
        source = source[:self.storage.numel * size].cast({1: "B", 2: "H", 4: "I", 8: "Q"}[size])
        axes = self.merged_axes()
        if not axes or (len(axes) == 1 and axes[0][1] == 1):
            return source[self.offset:self.offset + self.numel()].cast("B")
        result = bytearray(self.bytes())
        target = memoryview(result).cast(source.format)
        # The longest axis is copied at once, and a loop runs over the others.
        axes.sort()
        n, step, to_step = axes.pop()
        for starts in itertools.product(*([(i * s, i * t) for i in range(m)] for m, s, t in axes)):
            at = self.offset + sum(start[0] for start in starts)
            to = sum(start[1] for start in starts)
            if step == 0:
                values = memoryview(source[at:at + 1].tobytes() * n).cast(source.format)
            else:
                values = source[at:at + (n - 1) * step + 1:step]
            target[to:to + (n - 1) * to_step + 1:to_step] = values
        return result

    def merged_axes(self):
        """(length, stride, stride in row-major order) of each axis longer than 1; axes that can be walked as one are one."""
        axes, row_major = [], 1
        for n, s in zip(reversed(self.shape), reversed(self.stride)):
            if n == 1:
                continue
            if axes and s == axes[-1][0] * axes[-1][1]:
                axes[-1] = (axes[-1][0] * n, *axes[-1][1:])
            else:
                axes.append((n, s, row_major))
            row_major *= n
        return axes


def rebuild_tensor(storage, offset, shape, stride, *_):
    return Tensor(storage, offset, shape, stride)


def rebuild_parameter(data, *_):
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is no tensor")
    return data


class Call(metaclass=Frozen):
    """A function that the pickle may call, and do nothing else with."""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise Refused("the pickle tries to change a function")


KNOWN = {
    "collections.OrderedDict": Table,
    "torch._utils._rebuild_tensor": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Call(rebuild_tensor),
    "torch._utils._rebuild_parameter": Call(rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": Call(rebuild_parameter),
    "torch.Size": Call(lambda shape=(): as_axes(shape)),
    **{f"torch.{name}": StorageType(*kind) for name, kind in STORAGES.items()},
    # Of these a stand-in is made, which holds nothing.
    **{name: Inert for name in (
        "argparse.Namespace", "yacs.config.CfgNode", "torch.device", "_codecs.encode", "numpy.dtype", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar", "pathlib.PosixPath", "pathlib._local.PosixPath", "collections.Counter", "__builtin__.set", "builtins.set",
        *(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")))},
}


# The unpickler written in Python: the one in C takes as much memory as a forged number of a memo says.
class Unpickler(pickle._Unpickler):
    def __init__(self, file, inert, storage_of):
        super().__init__(file, encoding="utf-8")
        self.inert, self.storage_of = inert, storage_of

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full in self.inert:
            return Inert
        if full not in KNOWN:
            hint = (f". If it only stands beside the weights, '--inert {full}' reads the file with an empty stand-in for it"
                    if re.fullmatch(r"[A-Za-z_][\w.]{,199}", full, re.ASCII) else "")
            raise Refused(f"the pickle asks for {shown(full)}, which no table of weights needs; nothing of it was run{hint}")
        return KNOWN[full]

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], StorageType)):
            raise Refused("a reference that is no storage")
        if len(pid) > 5 and pid[5] is not None:
            raise Refused("a storage that is part of another one, as PyTorch before 0.4 wrote them")
        if not (isinstance(pid[2], str) and is_count(pid[4])):
            raise Refused("a storage without a name or a size")
        return self.storage_of(pid[1], pid[2], pid[4])

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self):  # would take as much memory as it says, whatever the file holds
        raise Refused("the pickle holds a bytearray, which no table of weights needs")
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_setitem(self):
        check_keys(self.stack[-2:-1])
        super().load_setitem()
    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        check_keys(self.stack[0::2])
        super().load_setitems()
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self):
        check_keys(self.stack[0::2])
        super().load_dict()
    dispatch[pickle.DICT[0]] = load_dict

    def load_set(self):
        check_keys(self.stack)
        super().load_frozenset()
    dispatch[pickle.FROZENSET[0]] = load_set

    def load_additems(self):
        check_keys(self.stack)
        super().load_additems()
    dispatch[pickle.ADDITEMS[0]] = load_additems


def unpickle(file, inert, storage_of):
    try:
        return Unpickler(file, inert, storage_of).load()
    except Refused:
        raise
    except (EOFError, pickle.UnpicklingError) as e:
        raise Refused(f"the file is truncated or damaged ({shown(e) if str(e) else 'its pickle ends too early'})")
    except RecursionError:
        raise Refused("the pickle is nested too deep")
    except MemoryError:
        raise Refused("there is not enough memory for what the pickle asks for")
    except Exception as e:  # whatever an odd pickle does to the machine that reads it
        raise Refused(f"the pickle is damaged ({type(e).__name__}: {shown(e)})")


def load_zip(path, inert):
    """PyTorch 1.6 and newer: <name>/data.pkl, <name>/data/<key>, stored without compression."""
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Refused("this zip archive holds no data.pkl in a folder of its own: torch.save did not write it")
    folder = pickles[0][:-len("data.pkl")]
    members = {info.filename: info for info in archive.infolist()}
    if folder + "constants.pkl" in members:
        raise Refused("this is a TorchScript archive, which holds a program; save its state_dict() with torch.save")

    def read(name):
        info = members.get(folder + name)
        if info is None:
            raise Refused(f"the archive has no {shown(name)}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"{shown(name)} is compressed, which torch.save never does")
        try:
            return archive.read(info)
        except ZIP_ERRORS as e:
            raise Refused(f"{shown(name)} in the zip archive is truncated or damaged ({shown(e)})")

    if folder + "byteorder" in members and read("byteorder").strip() != b"little":
        raise Refused("its values are big-endian")

    storages = {}

    def storage_of(kind, key, numel):
        info = members.get(f"{folder}data/{key}")
        if info is None or info.file_size < numel * kind.size:
            raise Refused(f"storage {shown(key)} should have {numel * kind.size} bytes and has {info.file_size if info else 'none'}")
        return storages.setdefault((key, kind.dtype, numel), Storage(kind, numel, lambda: read(f"data/{key}")))

    return unpickle(io.BytesIO(read("data.pkl")), inert, storage_of)


def load_legacy(path, inert):
    """PyTorch before 1.6: four pickles (magic number, version, system, the object), the list of storages, and their values."""
    file = open(path, "rb")

    def nothing(*_):
        raise Refused("a storage where there can be none")

    if unpickle(file, inert, nothing) != LEGACY_MAGIC:
        raise Refused("this is a pickle, but not one of torch.save")
    version, system = unpickle(file, inert, nothing), unpickle(file, inert, nothing)
    if version != 1001:
        raise Refused("this version of PyTorch's format is unknown")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Refused("its values are big-endian")
    places, kinds, sizes = {}, {}, {}
    end = os.path.getsize(path)

    def storage_of(kind, key, numel):
        if kinds.setdefault(key, kind) is not kind or sizes.setdefault(key, numel) != numel:
            raise Refused(f"storage {shown(key)} has two types or sizes")

        def read():
            file.seek(places[key])
            return file.read(numel * kind.size)
        return Storage(kind, numel, read)

    result = unpickle(file, inert, storage_of)
    keys = unpickle(file, inert, nothing)
    if not (isinstance(keys, list) and all(type(key) is str for key in keys) and set(keys) == set(kinds)):
        raise Refused("the list of storages is not that of the tensors")
    for key in keys:
        count = file.read(8)
        if len(count) != 8 or struct.unpack("<q", count)[0] != sizes[key]:
            raise Refused(f"storage {shown(key)} is truncated or of another size")
        places[key] = file.tell()
        after = places[key] + sizes[key] * kinds[key].size
        if after > end:
            raise Refused(f"the file is truncated: storage {shown(key)} ends at byte {after} of {end}")
        file.seek(after)
    return result


def load(path, inert):
    with open(path, "rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04":
        try:
            return load_zip(path, inert)
        except ZIP_ERRORS as e:
            raise Refused(f"the zip archive is truncated or damaged ({shown(e)})")
    if head[257:262] == b"ustar":
        raise Refused("this is the tar format of PyTorch before 0.2; load and save it with a newer PyTorch")
    if head[:1] == b"\x80":
        return load_legacy(path, inert)
    try:
        if struct.unpack("<Q", head[:8])[0] < 100_000_000 and head[8:9] == b"{":
            raise Refused("this is a safetensors file already")
    except struct.error:
        pass
    raise Refused("this is neither a zip archive nor a pickle of torch.save")


def is_table(x):
    return isinstance(x, dict) and any(isinstance(v, Tensor) for v in x.values())


def find_weights(loaded, key, ema):
    """The table of weights in what was loaded, and the path of keys that leads to it."""
    if not isinstance(loaded, dict):
        raise Refused("it holds no table of weights")
    known = ", ".join(shown(k) for k in loaded if isinstance(loaded[k], dict)) or "none"
    if key:
        part = loaded
        for name in key.split("/"):
            if not isinstance(part, dict) or name not in part:
                raise Refused(f"there is no '{key}' in it; tables in it: {known}")
            part = part[name]
        if not is_table(part):
            raise Refused(f"'{key}' is no table of weights")
        return part, key
    for name in EMA_KEYS if ema else WEIGHT_KEYS:
        part = loaded.get(name)
        if is_table(part):
            return part, name
        for inner in WEIGHT_KEYS:
            if isinstance(part, dict) and is_table(part.get(inner)):
                return part[inner], f"{name}/{inner}"
    if ema:
        raise Refused(f"it holds no moving average ({', '.join(EMA_KEYS)}); tables in it: {known}")
    if is_table(loaded):
        return loaded, ""
    raise Refused(f"it holds no table of weights under {', '.join(WEIGHT_KEYS)}; tables in it: {known}; --key NAME takes one")


def strip_prefixes(names):
    """How much to take away from every name."""
    taken = ""
    while True:
        prefix = next((p for p in PREFIXES if names and all(n.startswith(taken + p) and len(n) > len(taken + p) for n in names)), None)
        if prefix is None:
            return len(taken)
        taken += prefix


def usual_mode(path):
    """Who may read and write what is written: as before, or as with any new file (a temporary one is for its owner alone)."""
    if os.path.exists(path):
        return os.stat(path).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write(path, tensors):
    """safetensors: the length of a JSON header, the header, and the values, those of large elements first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].storage.type.size, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        size = tensors[name].bytes()
        header[name] = {"dtype": tensors[name].storage.type.dtype, "shape": list(tensors[name].shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.realpath(path)  # a link stays one
    handle, partial = tempfile.mkstemp(prefix=os.path.basename(path)[:100] + ".", suffix=".partial", dir=os.path.dirname(path))
    try:
        with open(handle, "wb") as file:
            os.chmod(partial, usual_mode(path))
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                data = tensors[name].data()
                if len(data) != tensors[name].bytes():
                    raise Refused(f"the values of {shown(name)} are truncated")
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    return offset


def check_names(names):
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Refused(f"the name of a tensor is no Unicode text: {shown(name)}")


def convert(args):
    if os.path.exists(args.output) and not os.path.isfile(args.output):
        raise OSError(f"{args.output} is no regular file, and nothing else is replaced")
    weights, where = find_weights(load(args.input, set(args.inert)), args.key, args.ema)
    odd = [shown(name) for name, value in weights.items() if not (isinstance(value, Tensor) and isinstance(name, str))]
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor) and isinstance(name, str)}
    check_names(tensors)
    cut = strip_prefixes(list(tensors))
    tensors = {name[cut:]: value for name, value in tensors.items()}
    if "__metadata__" in tensors:
        raise Refused("a tensor is called __metadata__, which safetensors does not allow")
    limit = MOST_EXPANSION * os.path.getsize(args.input) + MOST_EXTRA_BYTES
    total = sum(tensor.bytes() for tensor in tensors.values())
    if total > limit:
        raise Refused(f"its tensors would take {total} bytes, far more than the file: they repeat a few values")
    size = write(args.output, tensors)
    kinds = sorted({tensor.storage.type.dtype for tensor in tensors.values()})
    print(f"{args.output}: {len(tensors)} tensors, {size} bytes, {', '.join(kinds)}" + (f", from '{where}'" if where else ""))
    if odd:
        print(f"left out, as they are no tensors: {', '.join(odd)}")


def main():
    parser = argparse.ArgumentParser(description="Writes the weights of a PyTorch checkpoint as safetensors, without running its pickle.",
                                     epilog="Exit codes: 0 done; 1 the file was refused or cannot be read; 2 wrong usage.")
    parser.add_argument("input", help="checkpoint of torch.save: .pth, .pt, .bin, .pth.tar")
    parser.add_argument("output", help="safetensors file to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (model_ema, state_dict_ema)")
    parser.add_argument("--key", help="where the weights are, for unusual files; parts separated by /")
    parser.add_argument("--inert", action="append", default=[], metavar="MODULE.NAME",
                        help="read past this name with an empty stand-in; still nothing is run (repeatable)")
    args = parser.parse_args()
    if os.path.exists(args.input) and os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        parser.error("input and output are the same file")
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may have letters that the terminal has not
    try:
        convert(args)
    except Refused as e:
        sys.exit(f"pth_to_safetensors: {args.input}: {e}")
    except MemoryError:
        sys.exit(f"pth_to_safetensors: {args.input}: there is not enough memory for its largest tensor")
    except OSError as e:
        sys.exit(f"pth_to_safetensors: {e}")


if __name__ == "__main__":
    main()
