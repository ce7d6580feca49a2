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
    """

    name: str
    columns: list[str]
    class_names: dict[str, list[str]]
    file_names: list[str]
    splits: list[str] | None

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
