"""Makes the notebooks of docs/notebooks from the scripts beside them, and runs them:

    python scripts/site/notebooks.py

Needs what the extra `docs` brings, and that of the command. `tests/test_docs.py` compares their cells with the scripts.
"""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # so that figures go into the notebook
    for script in sorted(FOLDER.glob("*.py")):
        notebook = jupytext.read(script, fmt="py:percent")
        NotebookClient(notebook, coalesce_streams=True, resources={"metadata": {"path": str(FOLDER)}}).execute()
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
            cell.metadata.clear()  # times of execution
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb").name)


if __name__ == "__main__":
    main()
