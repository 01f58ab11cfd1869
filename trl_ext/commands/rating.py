"""`trl-ext rate`."""

from __future__ import annotations

from argparse import Namespace

from trl_ext.rating.exporting import export
from trl_ext.rating.store import Store


def rate(chosen: Namespace) -> int:
    settings = chosen.mode, chosen.per_item, chosen.repeats, chosen.attention
    if chosen.export is not None:
        if (chosen.answers, *settings) != (None,) * 5:
            raise ValueError(
                "--export writes what the store holds, and stops: leave out the file of answers, --mode, --per-item, "
                "--repeats and --attention."
            )
        with Store.read(chosen.store) as store:
            exported = export(store, chosen.export)
        print(f"{exported.rows:,} judgements by {exported.raters} raters written to {chosen.export}")
        print(exported, end="\n" if str(exported) else "")
        return 0
    try:
        from trl_ext.rating.serving import listening, serve
    except ImportError as error:
        raise ImportError(f"The page needs {error.name}: pip install 'trl-ext[rate]'.") from error
    if not chosen.store.exists():  # none is made where the page cannot be served
        listening(chosen.host, chosen.port).close()
    with Store.open(chosen.store, chosen.answers, *settings) as store:
        if store.unread:
            print(f"columns not used: {', '.join(store.unread)} (who wrote an answer stands in 'policy')", flush=True)
        print(f"{store}. Several raters: add ?rater=NAME to the link. Ctrl+C stops.", flush=True)
        if bare := store.prompts_left_out():
            print(f"{bare:,} prompts are left out: --mode {store.mode.name} needs {store.mode.needs}.", flush=True)
        serve(store, chosen.host, chosen.port, not chosen.no_browser)
    return 0
