"""What Python's huggingface_hub finds in a cache: prints the snapshot's folder and its files as JSON. Offline."""

import json
import sys
from pathlib import Path

from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache

cache, repo, revision = sys.argv[1:]
folder = snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
info = scan_cache_dir(cache)
repos = [
    {
        "repo": found.repo_id,
        "revisions": [
            {"commit": r.commit_hash, "refs": sorted(r.refs), "files": sorted(f.file_name for f in r.files)}
            for r in found.revisions
        ],
    }
    for found in info.repos
]
print(
    json.dumps(
        {
            "folder": folder,
            "config": try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision),
            "repos": repos,
            "warnings": [str(w) for w in info.warnings],
            "incomplete": len(info.incomplete_files),
            "names": sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()),
        }
    )
)
