"""Reads files of torch.save: zip archives of PyTorch 1.6 and newer, and the pickles one behind another of older ones.

load(path, inert) returns what was saved, with tensors of torch_pickle.py. Used by pth_to_safetensors.py.
"""
import io
import os
import struct
import zipfile

from torch_pickle import Refused, Storage, shown, unpickle

ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError, struct.error)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


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
