"""What a new loss costs beside the host's own: a program in the pull request's text, for whoever wants to know.

It prints ratios of losses that take turns. What it printed here is not in the text: that is the machine's own.
"""

from string import Template

from upstream.clone import template


def program(imports, losses, same=None):
    """A program for the clone's folder: a table of ratios and, if asked for, the difference of two losses.

    Args:
        imports: what it begins with.
        losses: from name to an expression, a loss function of two views; the others are compared with the first.
        same: two of that kind that are to agree.
    """
    agreement = Template(template("benchmark_agreement.py")).substitute(same=_dict(same)) if same else ""
    whole = Template(template("benchmark.py")).substitute(imports=imports, losses=_dict(losses), agreement=agreement)
    return whole.strip()


def _dict(losses):
    return "{\n" + "".join(f'    "{name}": {code},\n' for name, code in losses.items()) + "}"


def section(code):
    """The section of the text."""
    return Template(template("benchmark.md")).substitute(program=code).strip()
