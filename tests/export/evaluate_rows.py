"""A process that loads a saved classifier with plain transformers, and evaluates it on rows from a file.

    python evaluate_rows.py FOLDER ROWS.pt OUT.pt {with,without}

ROWS.pt holds a list of batches; OUT.pt gets the logits. 'without': hf_drt cannot be imported, as where it has never
been installed; 'with': it is imported first.
"""

import importlib.abc
import sys


class Blocker(importlib.abc.MetaPathFinder):
    """As if a package were not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "hf_drt":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def main(folder: str, rows: str, out: str, package: str) -> None:
    if package == "without":
        sys.meta_path.insert(0, Blocker())
        try:
            import hf_drt
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError(f"the blocker has let {hf_drt} through")
    else:
        import hf_drt
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in torch.load(rows)])
    assert (package == "without") == (not any(name.partition(".")[0] == "hf_drt" for name in sys.modules))
    torch.save(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
