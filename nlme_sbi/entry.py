"""How a script begins: there are standard streams, and Ctrl-C is watched, before anything else is imported."""

from __future__ import annotations

from nlme_sbi.compute.interrupts import end, open_closed_streams, watch

TYPE_CHECKING = False  # typing itself is not imported: it takes as long as all that is needed here
if TYPE_CHECKING:
    from collections.abc import Callable


def entry_point(stage: str, config_name: str, *, words: str | None = None) -> Callable[[], None]:
    """What a script runs as ``main``; see :func:`nlme_sbi.cli.entry_point`, which is imported when it is called.

    Args:
        stage: ``"module:function"``.
        config_name: primary configuration in ``conf/``.
        words: the key, a list, that arguments without "=" belong to; none when left out.
    """

    def main() -> None:
        open_closed_streams()
        watch()
        from nlme_sbi import cli

        try:
            cli.entry_point(stage, config_name, words=words)()
        finally:
            end()

    return main
