from collections.abc import Collection, Sequence
from typing import Any, BinaryIO, Protocol


class ImageTable(Protocol):
    """Rows of someone's images and whatever columns stand beside them, as `LabelledImages` reads them.

    Attributes:
        name: Where the rows come from, for messages.
        columns: Names of the columns, without that of the images.
        class_names: Names by number of the columns that hold class numbers.
        file_names: One distinct name an image.
        splits: The part of the set that each row's file or folder says it belongs to, such as `test`; `None` where
            they say nothing.
        faults: Rows at fault, by row, and what is wrong with each; a row may have several.
        unread: Rows of which nothing could be read: their cells are `None`. They are among `faults`.
        remarks: What of how the table is read does not go without saying, for a reader.
    """

    name: str
    columns: list[str]
    class_names: dict[str, list[str]]
    file_names: list[str]
    splits: list[str] | None
    faults: Sequence[tuple[int, str]]
    unread: Collection[int]
    remarks: Sequence[str]

    def where(self, row: int) -> str:
        """Names a row for messages, such as its file and line."""
        ...

    def read_column(self, name: str) -> list[Any]:
        """Returns the cells of a column."""
        ...

    def open_file(self, row: int) -> BinaryIO:
        """Opens a row's image file; several threads call it at once."""
        ...

    def key(self) -> list[Any]:
        """Returns what changes, as JSON, when the images may have: sizes and time stamps of files."""
        ...
