"""Edits of a host's file that hold on to what is there, and name the file and the place where it is gone."""

import re


class Source:
    """A file of the host under change.

    Attributes:
        path: within the clone.
        text: as it stands now.
    """

    def __init__(self, path, text):
        self.path, self.text = path, text

    def replace(self, anchor, new):
        """Every `anchor`, literally."""
        self._need(anchor in self.text, anchor)
        self.text = self.text.replace(anchor, new)
        return self

    def first(self, anchor, new):
        """The first `anchor`, literally."""
        self._need(anchor in self.text, anchor)
        self.text = self.text.replace(anchor, new, 1)
        return self

    def word(self, word, new):
        """Every `word` that stands alone."""
        self.text, found = re.subn(rf"\b{re.escape(word)}\b", lambda _: new, self.text)
        self._need(found, word)
        return self

    def after(self, anchor, new):
        """`new` behind the first `anchor`."""
        before, found, rest = self.text.partition(anchor)
        self._need(found, anchor)
        self.text = before + anchor + new + rest
        return self

    def append(self, new):
        """`new` behind the last line."""
        self.text = self.text.rstrip("\n") + "\n" + new
        return self

    def each_line(self, pattern, render):
        """Every line that `pattern` matches becomes the lines of `render(match)`."""
        regex = re.compile(rf"^{pattern}$", re.MULTILINE)
        self.text, found = regex.subn(lambda match: "\n".join(render(match)), self.text)
        self._need(found, pattern)
        return self

    def among(self, pattern, new, *, key=str.lower, until=None):
        """`new` among its like, which are in order: before the first match whose group sorts behind its own.

        Args:
            pattern: of one entry, with the group that orders the entries; entries follow each other.
            new: the entry.
            key: from the group to what is compared.
            until: what ends the list; None is the end of the file.
        """
        regex = re.compile(pattern, re.MULTILINE)
        own = regex.fullmatch(new)
        if own is None:
            raise ValueError(f"{new!r} does not look like its neighbours, {pattern!r}.")
        end = None if until is None else self.text.find(until)
        self._need(end != -1, until)
        entries = list(regex.finditer(self.text[:end]))
        self._need(entries, pattern)
        place = next((e.start() for e in entries if key(e[1]) > key(own[1])), entries[-1].end())
        self.text = self.text[:place] + new + self.text[place:]
        return self

    def part(self, anchor):
        """What begins with `anchor`."""
        self._need(anchor in self.text, anchor)
        return self.text[self.text.index(anchor) :]

    def _need(self, found, anchor):
        if not found:
            raise ValueError(
                f"{self.path} no longer has {anchor!r}, which this export holds on to: it was written for another "
                "commit of the host. Nothing was changed."
            )
