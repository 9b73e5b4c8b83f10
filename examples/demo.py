"""
The main job, step by step: two replicas work offline, and synchronize with a server in another process.

Run it with `make demo`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tidelog import attribute
from tidelog_client import Replica, Report

console = Console(highlight=False)
_step = 0


def main() -> None:
    """Tell the story."""
    with tempfile.TemporaryDirectory(prefix="tidelog-demo-") as folder:
        directory = Path(folder)
        with served(directory / "server") as address:
            say(f"A server process listens on {address}, its data in an embedded store.")
            with (
                Replica(directory / "laptop", server=address) as laptop,
                Replica(directory / "till", server=address) as till,
            ):
                milk = work_offline(laptop)
                meet(laptop, till)
                conflict(laptop, till, milk)
                delete(laptop, till, milk)
                converge(laptop, till)
    console.print("\n[bold green]Every operation was applied once or is kept as a failure. Nothing was lost.[/]")


def work_offline(laptop: Replica) -> str:
    """Make changes without a network, one of which the server will refuse."""
    step("The laptop works offline: each mutation appends an operation to its log")
    with laptop.transaction() as transaction:
        milk = transaction.create("Task", {"title": "Buy milk", "done": False, "count": 1})
        transaction.create("Task", {"title": "Call the bank", "done": False})
        transaction.create("Task", {"title": "", "done": False})
    laptop.update("Task", milk, {"note": "the blue one"})
    for pending in laptop.pending():
        operation = pending.operation
        say(f"  log {operation.seq}: {operation.kind.name.lower()} {operation.entity} {operation.id[-6:]}")
    return milk


def meet(laptop: Replica, till: Replica) -> None:
    """Synchronize both replicas for the first time."""
    step("The laptop synchronizes; the server refuses the task without a title")
    report = laptop.synchronize_all()
    tell("laptop", report)
    for failure in report.failures:
        say(f"  kept as a synchronization failure: {failure.reason}: {failure.message!r}, {failure.attributes}")
    tell("till", till.synchronize_all())
    show(till, "till")


def conflict(laptop: Replica, till: Replica, milk: str) -> None:
    """Change one object on both replicas at once."""
    step("Both edit the same task offline: other attributes merge, the last arrival wins, increments add up")
    laptop.update("Task", milk, {"title": "Buy oat milk"}, increment={"count": 2})
    till.update("Task", milk, {"title": "Buy goat milk", "done": True}, increment={"count": 3})
    tell("laptop", laptop.synchronize_all())
    tell("till", till.synchronize_all())
    tell("laptop", laptop.synchronize_all())
    show(laptop, "laptop")


def delete(laptop: Replica, till: Replica, milk: str) -> None:
    """Delete an object on one replica while the other edits it."""
    step("The till deletes the task while the laptop, still offline, edits it")
    till.delete("Task", milk)
    laptop.update("Task", milk, {"note": "or the green one"})
    tell("till", till.synchronize_unsynchronized())
    report = laptop.synchronize_all()
    tell("laptop", report)
    for failure in report.failures:
        say(f"  the edit is not lost: {failure.reason}: {failure.attributes}")


def converge(laptop: Replica, till: Replica) -> None:
    """Show that both replicas hold the same."""
    step("Both replicas show the same")
    till.synchronize_all()
    states = [sorted((task.id, str(task.to_dict())) for task in replica.query("Task")) for replica in (laptop, till)]
    if states[0] != states[1]:
        raise SystemExit("the replicas differ")
    show(laptop, "laptop")
    show(till, "till")
    say(f"  open tasks on either: {laptop.count('Task', attribute('done') == False)}")  # noqa: E712 - a constraint


@contextmanager
def served(data: Path) -> Iterator[str]:
    """Run a server in a process of its own and give its address."""
    command = [str(Path(sys.executable).with_name("tidelog")), "serve", "demo_application:app"]
    command += ["--data", str(data), "--listen", "127.0.0.1:0", "--log-level", "warning"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise SystemExit("the server did not start")
        yield line.split()[-1]
    finally:
        process.terminate()
        if process.wait() != 0:
            raise SystemExit("the server did not stop as it should")


def step(title: str) -> None:
    """Print the title of a step."""
    global _step  # noqa: PLW0603 - a counter of a script
    _step += 1
    console.print(f"\n[bold]{_step}. {title}[/]")


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, soft_wrap=True)


def tell(name: str, report: Report) -> None:
    """Print what a synchronization did."""
    say(
        f"  {name} synchronized: {report.applied} applied, {report.rejected} refused, "
        f"{report.downloaded} downloaded, {report.removed} removed"
    )


def show(replica: Replica, name: str) -> None:
    """Print the tasks of a replica."""
    for task in replica.query("Task", order_by="title"):
        say(f"  {name} shows {task.id[-6:]}: {task.to_dict()}")


if __name__ == "__main__":
    main()
