"""Fetches a model with Python's huggingface_hub from HF_ENDPOINT into a cache."""

import sys

from huggingface_hub import snapshot_download

cache, repo, revision = sys.argv[1:]
print(snapshot_download(repo, revision=revision, cache_dir=cache))
