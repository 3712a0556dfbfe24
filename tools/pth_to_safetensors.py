#!/usr/bin/env python3
"""Writes the weights of a PyTorch checkpoint (.pth, .pt, .bin, .pth.tar) as a safetensors file, which Mesa reads.

A .pth file is a pickle, and a pickle may ask for any code to be run. This program runs none of it: it knows the few names that a checkpoint
of weights needs (KNOWN in torch_pickle.py), each replaced by a stand-in of its own, and refuses a file that asks for any other, with that
name. Python 3.8 or newer is enough; neither PyTorch nor NumPy is needed. torch_files.py and torch_pickle.py must lie beside it.

    tools/pth_to_safetensors.py deit_tiny_patch16_224-a1311bcf.pth deit_tiny.safetensors
    mesa-eval deit_tiny.safetensors --config deit_ti.yaml --data /imagenet
    mesa-train --config deit_ti.yaml --weights deit_tiny.safetensors

The weights are looked for under the usual keys (model, state_dict; with --ema model_ema, state_dict_ema; or --key), else the file itself is
the table of weights. Prefixes of wrappers (module., _orig_mod., model.) go
where all names have them. Tensors keep their element types; views of shared or strided storages
become tensors of their own. Exit codes: 0 done; 1 the file was refused or cannot be read; 2 wrong usage.
"""
import argparse
import json
import os
import struct
import sys
import tempfile

sys.dont_write_bytecode = True  # the folder of the tools stays as it was installed
from torch_files import load
from torch_pickle import Refused, Tensor, shown

WEIGHT_KEYS = ("model", "state_dict", "module", "net")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
# What a file may make of views that repeat their storage, over its own size: a few bytes must not become a full disk.
MOST_EXPANSION, MOST_EXTRA_BYTES = 4, 256 << 20


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
