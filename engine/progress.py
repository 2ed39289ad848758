"""A progress bar: tqdm's, or where tqdm is not installed one that shows nothing."""

from collections.abc import Iterable, Iterator

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:
        """What the scripts use of tqdm's class, without a bar."""

        disable, n = True, 0

        def __init__(self, iterable: Iterable = (), *_, **__):
            self.iterable = iterable

        def __iter__(self) -> Iterator:
            return iter(self.iterable)

        def __enter__(self) -> "tqdm":
            return self

        def __exit__(self, *_) -> None:
            self.close()

        def update(self, n: float = 1) -> None:
            self.n += n

        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass

        def clear(self) -> None:
            pass

        def close(self) -> None:
            pass


__all__ = ["tqdm"]
