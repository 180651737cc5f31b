"""Everything about two GPUs, one step after another, each with a limit of its own; the tables come last.

    python scripts/two_gpus.py --data gsm8k/train.jsonl --out outputs/two_gpus
    python scripts/two_gpus.py --data gsm8k/train.jsonl --out /tmp/two_gpus --small       # on a CPU, to see it run

A step that fails or runs out of time leaves what it has written, and the next one goes on. Output of the steps is in
`<out>/<step>.log`, results are in `<out>/<step>/`, and the tables so far in `<out>/summary.md`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
# step: seconds that it may take, and its command; {out} and {data} are filled in
STEPS = {
    "tests": (170, "-m pytest -m gpu tests/gpu/test_two_gpus.py -q -rA --durations=5 -p no:cacheprovider -W ignore"),
    "context": (120, "scripts/bench_context_parallel.py --out {out}"),
    "scaling": (120, "scripts/bench_scaling.py --out {out}"),
    "learning": (200, "scripts/learning_proof.py --out {out} --data {data}"),
    "compiled": (100, "scripts/bench_scaling.py --out {out} --compile layers --parts one ddp fsdp"),
}
SMALL = {
    "tests": "-m pytest tests/parallel/test_sharded.py -q -rA -p no:cacheprovider",
    "context": "scripts/bench_context_parallel.py --out {out} --device cpu --lengths 2048 --heads 4 --kv-heads 2 "
    "--head-dim 16 --reps 1 --layers 1 --hidden 64",
    "scaling": "scripts/bench_scaling.py --out {out} --device cpu --ranks 2 --model tiny --seq-len 128 "
    "--long-seq-len 256 --long-steps 4 --pool 50 --steps 2 --warmup 1",
    "learning": "scripts/learning_proof.py --out {out} --data {data} --device cpu --devices 2 --model tiny "
    "--limit-documents 100 --seq-len 512 --tokens 1024 --epochs 1 --vocabulary 500 --seeds 0 1",
    "compiled": "scripts/bench_scaling.py --out {out} --device cpu --ranks 2 --model tiny --seq-len 128 --steps 2 "
    "--warmup 1 --long-seq-len 256 --compile layers --compile-backend aot_eager --parts one ddp fsdp",
}


def run(command: list[str], log: Path, limit: float) -> str:
    """Run in a group of processes of its own, so that the end of the time ends them all."""
    paths = [str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TQDM_DISABLE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=SCRIPTS.parent,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            return "done" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def shown(step: str, out: Path, log: Path) -> str:
    """The step's table; for tests, and for a step without one, the end of its output."""
    path = out / step / "table.md"
    table = path.read_text().strip() if path.exists() else ""
    if table:
        return table
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if step == "tests":
        kept = [line[:200] for line in lines if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED", "E  ", "="))]
        return "\n".join(kept[-40:])
    return "\n".join(line[:300] for line in lines[-15:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--small", action="store_true", help="tiny sizes on a CPU")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    out: Path = arguments.out.resolve()
    data = arguments.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    states: dict[str, str] = {}
    for step in arguments.steps:
        limit, command = STEPS[step]
        command = SMALL[step] if arguments.small else command
        left = arguments.budget - (time.monotonic() - began)
        at = time.monotonic()
        if left < 15:
            states[step] = "not begun: no time left"
            continue
        (out / step).mkdir(exist_ok=True)
        words = [word.format(out=out / step, data=data) for word in command.split()]
        state = run([sys.executable, *words], out / f"{step}.log", min(limit, left))
        states[step] = f"{state}, {time.monotonic() - at:.0f} s"
        print(f"{step}: {states[step]}", file=sys.stderr, flush=True)
        parts = [f"## {name}: {told}\n\n{shown(name, out, out / f'{name}.log')}" for name, told in states.items()]
        (out / "summary.md").write_text("\n\n".join(parts) + "\n")
    print((out / "summary.md").read_text() if (out / "summary.md").exists() else "nothing was run")
    if any(not state.startswith("done") for state in states.values()):
        raise SystemExit("; ".join(f"{step}: {state}" for step, state in states.items()))


if __name__ == "__main__":
    main()
