"""Settings of `trimtab feedback import` and `trimtab feedback list`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FeedbackImportConfig:
    """Import labels of stored answers from a file.

    They count as labels of raters that you trust.

    Args:
        file: file (.jsonl, .json, .csv, .parquet) with the columns id, correct and, if there are several answers or raters,
            choice and rater.
        signals: folder or bucket of `trimtab serve --keep_signals`.
        columns: other names of the columns, as --columns.correct NAME.
    """

    file: str
    signals: str = field(kw_only=True)
    columns: dict[str, str] = field(default_factory=dict[str, str], kw_only=True)


@dataclass(frozen=True)
class FeedbackListConfig:
    """List the stored answers and their labels.

    Args:
        signals: folder or bucket of `trimtab serve --keep_signals`.
    """

    signals: str
