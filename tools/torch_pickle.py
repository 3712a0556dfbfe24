"""Unpickles what torch.save wrote without running any of it: a few known names become stand-ins, every other one is refused.

Used by torch_files.py, which knows how such pickles and the values of their tensors lie in a file.
"""
import itertools
import pickle
import re

# Name of PyTorch's storage class: safetensors' element type, and bytes of a value.
STORAGES = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}
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
