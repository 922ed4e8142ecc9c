"""Results as files: JSON rows for machines, a Markdown table with the environment for people."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsight.measure.environment import environment

Row = Mapping[str, Any]


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table.

    Columns are the keys of all rows, in order of first appearance.

    Args:
        rows: numbers and text by column name; a missing value becomes an empty cell, a float keeps
            four significant digits.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {
        column: all(isinstance(row.get(column, 0), (int, float)) for row in rows)
        for column in columns
    }
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if numeric[column] else "---" for column in columns) + "|",
    ]
    lines += [
        "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


def environment_block(described: Mapping[str, str] | None = None) -> str:
    """The environment as a Markdown list.

    Args:
        described: from `environment()`; by default that of now.
    """
    described = environment() if described is None else described
    return "\n".join(f"- {name}: {text}" for name, text in described.items())


def write_report(
    stem: str | Path,
    rows: Sequence[Row],
    *,
    title: str,
    command: str,
    notes: str = "",
) -> tuple[Path, Path]:
    """Write rows as `<stem>.json` and `<stem>.md`, with date, command and environment.

    A result is a dated file that is never edited afterwards: an existing file is not overwritten.

    Args:
        stem: path without suffix; its folder is made.
        rows: the measurements, one mapping each, units in the names.
        title: of the Markdown page.
        command: that printed these numbers, to be typed at the root of the repository.
        notes: Markdown between table and environment: what is counted, what was left out.

    Returns:
        The paths of the JSON and the Markdown file.

    Raises:
        ValueError: there are no rows.
        FileExistsError: a report of this name exists.
    """
    if not rows:
        raise ValueError(
            f"write_report: {title!r} has no rows; a report needs at least one measurement; "
            "look at what the benchmark skipped."
        )
    stem = Path(stem)
    json_path, markdown_path = (
        stem.with_name(stem.name + ".json"),
        stem.with_name(stem.name + ".md"),
    )
    for path in (json_path, markdown_path):
        if path.exists():
            raise FileExistsError(
                f"write_report: {path} exists; a result is never edited afterwards; write it under "
                "a new name or date."
            )
    stem.parent.mkdir(parents=True, exist_ok=True)
    described = environment()
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    content = {
        "title": title,
        "date": when,
        "command": command,
        "environment": described,
        "rows": [dict(row) for row in rows],
    }
    json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    parts = [
        f"# {title}",
        f"{when}, `{command}`",
        markdown_table(rows),
        *([notes] if notes else []),
        "## Environment",
        environment_block(described),
    ]
    markdown_path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return json_path, markdown_path


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
