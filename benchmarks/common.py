"""What the benchmarks share: every side in a process of its own, all sides in turn,
medians, and the machine's own limits.

Times on shared machines move, so nothing is compared across runs: in each round every
side measures once, the order turning by one from round to round, while the others
sleep. A side's figure is the median of its rounds; a ratio is the median of the rounds'
ratios. The peak of memory is the process's own: the resident set on a CPU, what torch
allocated on CUDA.
"""

import argparse
import datetime
import functools
import importlib
import json
import multiprocessing
import pathlib
import platform
import statistics
import threading
import time
import warnings

import torch
from tqdm.auto import tqdm

import minillm
from minillm import checkpoints, files, zoo
from minillm.measure import report

HERE = pathlib.Path(__file__).parent
SHAPES = {  # with SmolLM2's tokenizer; its own weights where there is no configuration
    "smollm2": None,
    "1b": minillm.Config(49152, 2048, 16, 32, kv_heads=8, ffn=8192, positions=4096),
}


def arguments(text, **numbers):
    """The options of all benchmarks, and a benchmark's own `numbers` with their defaults."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2",
                        help="smollm2: SmolLM2-135M itself; 1b: a Llama of 1.1B random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all cores")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.numbers = numbers
    return args


def run(module, sides, args, settings):
    """{side: [what its measure() returned, one a round]}. Each side is `setup(side,
    settings) -> measure` in the module."""
    settings |= dict(device=args.device, threads=args.threads)
    chosen = {name: side for name, side in sides.items() if not args.sides or name in args.sides}
    if not chosen:
        raise SystemExit(f"no side is called {args.sides}; known: {', '.join(sides)}")
    found, processes = {name: [] for name in chosen}, {}
    spawn = multiprocessing.get_context("spawn")
    try:
        for name, side in chosen.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(module, side, settings, theirs),
                                    daemon=True)
            process.start()
            theirs.close()
            processes[name] = (process, ours)
            ready = ours.recv()
            if ready is not None:
                print(f"{name} is left out: {ready}")
                del found[name]
        names = list(found)
        for i in tqdm(range(args.rounds), unit="round"):
            for name in names[i % len(names):] + names[:i % len(names)]:
                processes[name][1].send("measure")
                found[name].append(processes[name][1].recv())
    finally:
        for process, _ in processes.values():
            process.terminate()
    return found


def serve(module, side, settings, pipe):
    """A side's process: set up, then measure whenever asked."""
    warnings.simplefilter("ignore")  # of the libraries that are measured
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    try:
        measure = importlib.import_module(module).setup(side, settings)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while pipe.recv():
        pipe.send({**measure(), "peak_bytes": peak(settings["device"])})


def peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else report.peak_memory()


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median(rows, key):
    return statistics.median(row[key] for row in rows)


def ratio(rows, base, key):
    """The median over the rounds of rows / base."""
    return statistics.median(a[key] / b[key] for a, b in zip(rows, base))


def checkpoint(shape="smollm2"):
    """A directory with the model of the shape in the Hugging Face layout, that all sides load:
    SmolLM2 in float32, or random weights in bfloat16."""
    config = SHAPES[shape]
    path = files.cache() / (f"llama-{shape}-bfloat16" if config else "smollm2-float32")
    if not (path / "config.json").exists():
        model, tokenizer = zoo.load("smollm2", dtype="float32")
        if config:
            torch.manual_seed(0)
            model = minillm.Transformer(config).bfloat16()
        checkpoints.save(model, path, tokenizer=tokenizer)
    return str(path)


def limits(device):
    """The machine's own: bytes read a second, and operations of a matrix product a second,
    by dtype. A CPU without bfloat16 instructions takes minutes for a large product, so the
    products grow only while they are fast."""

    def seconds(work):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - began

    def fastest(work, repeats=7):
        return min(seconds(work) for _ in range(repeats))

    many = torch.ones(1 << 27, device=device)  # 512 MiB, beyond any cache
    found = {"bytes/s": many.numel() * 4 / fastest(many.sum)}
    for dtype in (torch.float32, torch.bfloat16):
        n, product = 128, None
        seconds(lambda: torch.ones(128, 128, device=device, dtype=dtype) @ torch.ones(
            128, 128, device=device, dtype=dtype))  # the first product loads the library
        largest = 8192 if device == "cuda" else 2048
        while product is None or n < largest and seconds(product) < 0.1:
            n *= 2
            a = torch.randn(n, n, device=device, dtype=dtype)
            product = functools.partial(torch.matmul, a, a)
        found[f"{str(dtype).removeprefix('torch.')} FLOP/s"] = 2 * n**3 / fastest(product)
    return found


def keep(name, args, settings, rows, limits):
    """Write the figures to benchmarks/results, and all kept figures as tables to
    docs/benchmarks.md. A run of some sides has a file of its own."""
    device = args.device
    features = torch.backends.cpu.get_cpu_capability()
    machine = f"{processor()} ({features}), {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "peft", "llama_cpp"):
        try:
            versions[package] = importlib.import_module(package).__version__
        except ImportError:
            pass
    command = f"python -m benchmarks.{name}" + f" --device {device}" * (device != "cpu")
    if args.shape != "smollm2":
        command += f" --shape {args.shape}"
        name += f"-{args.shape}"
    for option, default in args.numbers.items():
        if getattr(args, option) != default:
            command += f" --{option} {getattr(args, option)}"
    if args.sides:
        command += " --sides " + " ".join(f'"{side}"' for side in args.sides)
    kept = dict(benchmark=name, command=command,
                date=str(datetime.date.today()), machine=machine, versions=versions,
                settings=settings, limits=limits, rows=rows)
    some = "-some" if args.sides else ""
    with files.atomic(HERE / "results" / f"{name}-{device}{some}.json") as new:
        new.write_text(json.dumps(kept, indent=2) + "\n")
    document()
    print(section(kept))


def document():
    """Write docs/benchmarks.md from all results."""
    parts = [
        "# Benchmarks\n\nSmolLM2-135M, or the shape that the command names. The command above "
        "each table writes it; `benchmarks/common.py` explains how it measures. Ratios are "
        "medians over the rounds of one run, in which the sides take turns."
    ]
    every = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    parts += [section(one) for one in every if "benchmark" in one]
    with files.atomic(HERE.parent / "docs" / "benchmarks.md") as new:
        new.write_text("\n\n".join(parts) + "\n")


def section(kept):
    """A result as Markdown. `note`, written by hand into its file, comes after the table."""
    limits = ", ".join(f"{key} {value / 1e9:,.0f} G" for key, value in kept["limits"].items())
    versions = ", ".join(f"{key} {value}" for key, value in kept["versions"].items())
    return (
        f"## {kept['benchmark']}, {kept['machine']}\n\n`{kept['command']}`, {kept['date']}; "
        f"{versions}. The machine's limits, measured in the same run: {limits}.\n\n"
        f"{report.table(kept['rows'])}" + (f"\n\n{kept['note']}" if "note" in kept else "")
    )


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
