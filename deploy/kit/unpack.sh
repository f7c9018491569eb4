#!/bin/sh
# unpack.sh [TARGET]: puts the parts beside this folder together and unpacks them into TARGET (default: unpacked, beside it). Wants
# coreutils and python3 alone. An archive of which no part is there is left out, but for the first; one that lacks a part is an error.
set -eu
start=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$start" "${1:-$start/../unpacked}" <<'PYTHON'
import hashlib
import json
import os
import sys
import tarfile
import time

start, target = sys.argv[1:]
kit = os.path.dirname(start)
with open(os.path.join(start, "manifest.json")) as file:
    manifest = json.load(file)


class Joined:
    """The parts of an archive as one stream."""

    def __init__(self, paths):
        self.paths, self.file = list(paths), None

    def read(self, size):
        while True:
            if self.file is None:
                if not self.paths:
                    return b""
                self.file = open(self.paths.pop(0), "rb")
            data = self.file.read(size)
            if data:
                return data
            self.file.close()
            self.file = None


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive, first):
    name, parts = archive["name"], archive["parts"]
    missing = [part["path"] for part in parts if not os.path.exists(os.path.join(kit, part["path"]))]
    if missing and not first and len(missing) == len(parts):
        return f"{name}: not here"
    if missing:
        sys.exit(f"[unpack] expected all {len(parts)} parts of {name} in {kit}, got none of {', '.join(missing)}: bring them, too")
    stamp = os.path.join(target, f".unpacked-{name}")
    whole = "".join(part["sha256"] for part in parts)
    if os.path.exists(stamp) and open(stamp).read() == whole:
        return f"{name}: unpacked before"
    paths = [os.path.join(kit, part["path"]) for part in parts]
    for part, path in zip(parts, paths):
        if digest(path) != part["sha256"]:
            sys.exit(f"[unpack] expected {part['path']} with SHA-256 {part['sha256']}, got other bytes: bring it again")
    begun = time.monotonic()
    with tarfile.open(fileobj=Joined(paths), mode="r|xz") as tar:
        tar.extractall(target, filter="tar")
    with open(stamp, "w") as file:
        file.write(whole)
    return f"{name}: {len(parts)} parts, {time.monotonic() - begun:.1f} s"


os.makedirs(target, exist_ok=True)
for i, archive in enumerate(manifest["archives"]):
    print(unpack(archive, i == 0), flush=True)
PYTHON
