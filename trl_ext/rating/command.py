"""What `trl-ext rate` does, apart from the other commands: their imports take longer than a rater likes to wait."""

from __future__ import annotations

from argparse import Namespace

from trl_ext.rating.exporting import export
from trl_ext.rating.store import Store


def rate(chosen: Namespace) -> int:
    if chosen.export is not None:
        with Store.read(chosen.store) as store:
            exported = export(store, chosen.export)
        print(f"{exported.rows:,} judgements by {exported.raters} raters written to {chosen.export}")
        print(exported, end="\n" if str(exported) else "")
        return 0
    try:
        from trl_ext.rating.serving import serve
    except ImportError as error:
        raise ImportError(f"The page needs {error.name}: pip install 'trl-ext[rate]'.") from error
    settings = chosen.mode, chosen.per_item, chosen.repeats, chosen.attention
    with Store.open(chosen.store, chosen.answers, *settings) as store:
        print(f"{store}. Several raters: add ?rater=NAME to the link. Ctrl+C stops.", flush=True)
        serve(store, chosen.host, chosen.port, not chosen.no_browser)
    return 0
