"""Rows on disk as they come: a run that is cut keeps what it measured, and goes on from there.

A script is a list of stages, each of which yields rows. After every row the script's JSON and
Markdown files are replaced (written beside, then renamed). The rows of one file come from one
environment: a stage can be measured again and replaces its rows only if nothing else changed.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsight.measure import environment_block, markdown_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of a script that is measured in one go.

    Attributes:
        name: as `--only` takes it.
        measure: yields its rows.
    """

    name: str
    measure: Callable[[], Iterable[Row]]


class StageFile:
    """The rows of a script by stage, kept in `<stem>.json` and `<stem>.md`.

    Args:
        stem: path without suffix, or None to keep the rows in memory only.
        title: of the page.
        notes: Markdown below the table.
        described: the environment, text by name; that of an existing file must be the same.
        order: of the stages in the file.

    Raises:
        ValueError: the file exists and its rows were measured in another environment, or it is not
            of this kind.
    """

    def __init__(
        self,
        stem: Path | None,
        *,
        title: str,
        notes: str,
        described: Mapping[str, str],
        order: Sequence[str],
    ) -> None:
        self.stem, self.title, self.notes = stem, title, notes
        self.described, self.order = dict(described), list(order)
        # Stage -> its command, date, seconds, whether it is complete, and rows.
        self.stages: dict[str, dict[str, Any]] = {}
        path = None if stem is None else stem.with_name(stem.name + ".json")
        if path is None or not path.exists():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        if "stages" not in content:
            raise ValueError(
                f"bench: {path} holds no stages, but a report that is gone on with must name those "
                "of its rows; it is of another kind or version: choose a new folder with --out."
            )
        check_environment(path, content["environment"], self.described)
        for name, stage in content["stages"].items():
            rows = [
                {column: value for column, value in row.items() if column != "stage"}
                for row in content["rows"]
                if row["stage"] == name
            ]
            self.stages[name] = {**stage, "rows": rows}

    def rows(self, stage: str) -> list[Row]:
        """What is known of a stage; empty if it was not measured."""
        return list(self.stages.get(stage, {}).get("rows", []))

    def is_complete(self, stage: str) -> bool:
        """Whether the stage was measured to its end."""
        return bool(self.stages.get(stage, {}).get("complete"))

    def replace(
        self, stage: str, rows: Sequence[Row], *, command: str, seconds: float, complete: bool
    ) -> None:
        """Put rows in the place of those that the stage had, and write the files."""
        self.stages[stage] = {
            "command": command,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seconds": round(seconds, 1),
            "complete": complete,
            "rows": [dict(row) for row in rows],
        }
        known = [name for name in self.order if name in self.stages]
        self.stages = {
            name: self.stages[name]
            for name in [*known, *(name for name in self.stages if name not in known)]
        }
        if self.stem is not None:
            self._write(self.stem)

    def _write(self, stem: Path) -> None:
        described = list(self.stages.items())
        rows = [{"stage": name, **row} for name, stage in described for row in stage["rows"]]
        commands = list(dict.fromkeys(stage["command"] for _, stage in described))
        dates = sorted({stage["date"] for _, stage in described})
        content = {
            "title": self.title,
            "date": dates[-1],
            "command": "; ".join(commands),
            "environment": self.described,
            "stages": {
                name: {key: value for key, value in stage.items() if key != "rows"}
                for name, stage in described
            },
            "rows": rows,
        }
        cut = [name for name, stage in described if not stage["complete"]]
        parts = [
            f"# {self.title}",
            f"{dates[-1]}, " + "; ".join(f"`{command}`" for command in commands),
            *([f"**Cut short:** {', '.join(cut)}."] if cut else []),
            *tables({name: stage["rows"] for name, stage in described}),
            self.notes,
            "## Environment",
            environment_block(self.described),
        ]
        stem.parent.mkdir(parents=True, exist_ok=True)
        replace_text(stem.with_name(stem.name + ".json"), json.dumps(content, indent=1) + "\n")
        replace_text(stem.with_name(stem.name + ".md"), "\n\n".join(parts) + "\n")


def tables(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """The rows of all stages as Markdown: a table of those with the same columns.

    Each has its stages' names above it, unless one table holds all of them. Columns count as the
    same where one stage has all of another's, which may lack what it could not measure.
    """
    groups: list[tuple[list[str], list[Row]]] = []
    for name, of_stage in rows.items():
        columns = {column for row in of_stage for column in row}
        known = {column for row in groups[-1][1] for column in row} if groups else set()
        if groups and (columns <= known or known <= columns):
            groups[-1][0].append(name)
            groups[-1][1].extend(of_stage)
        else:
            groups.append(([name], list(of_stage)))
    heads = [f"## {', '.join(names)}" for names, _ in groups]
    parts = [[head, markdown_table(group)] for head, (_, group) in zip(heads, groups, strict=True)]
    return parts[0][1:] if len(parts) == 1 else [text for part in parts for text in part]


def check_environment(path: Path, known: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError where a file's rows were measured on something else than this."""
    changed = [
        f"{name}: {known.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} now"
        for name in dict.fromkeys([*known, *now])
        if known.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"bench: {path} holds rows of another environment ({'; '.join(changed)}), but the rows "
            "of one file must come from one; measure all of it into a new folder with --out, or go "
            "back to that environment."
        )


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run that is cut, sees the old text or the new one."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Those of a script's stages that are asked for, in its order; all where `only` is empty.

    Raises:
        ValueError: there is no such stage.
    """
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(
            f"--only: there is no stage {', '.join(unknown)}; this script has {', '.join(names)}; "
            "name some of these, or leave --only out."
        )
    return [name for name in names if not only or name in only]


def run_stages(
    file: StageFile,
    stages: Sequence[Stage],
    *,
    command: str,
    only: Sequence[str] = (),
    resume: bool = False,
) -> list[str]:
    """Measure stage after stage, printing and writing each row.

    A stage that fails does not take the others with it: its traceback is printed, its rows so far
    are kept as incomplete, and the next one is measured.

    Args:
        file: where the rows go.
        stages: all of the script's.
        command: that is run, for the record.
        only: names of the stages to measure; all where empty.
        resume: leave out the stages that are complete in the file.

    Returns:
        Names of the stages that failed.
    """
    failed = []
    names = chosen([stage.name for stage in stages], only)
    for stage in stages:
        if stage.name not in names:
            continue
        if resume and file.is_complete(stage.name):
            print(f"-- {stage.name}: measured before", flush=True)
            continue
        print(f"-- {stage.name}", flush=True)
        start = time.monotonic()
        rows: list[Row] = []

        def keep(complete: bool, name: str = stage.name, rows: list[Row] = rows) -> None:
            seconds = time.monotonic() - start  # noqa: B023  # called within this turn
            file.replace(name, rows, command=command, seconds=seconds, complete=complete)

        try:
            for row in stage.measure():
                rows.append(row)
                keep(complete=False)
        except Exception:  # whatever a rival raises; the run goes on and exits non-zero
            traceback.print_exc()
            failed.append(stage.name)
        else:
            if rows:
                keep(complete=True)
        if rows:
            print(markdown_table(rows))
        print(f"-- {stage.name}: {time.monotonic() - start:.0f} s", flush=True)
    return failed
