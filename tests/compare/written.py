"""Elements of a report, written by its templates around texts of a test."""

from types import SimpleNamespace

from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader

from lightning_znorm.compare.report import TEMPLATES, render


def written(kind: str, content: str, title: str = "", **values: object) -> str:
    """Return a report with other content.

    Args:
        kind: ``"html"`` or ``"md"``.
        content: A template, in place of ``sections.j2``; it finds its values in ``report``.
        title: The title, for the browser's tab.
        values: The values.
    """
    template = f'{{% extends "report.{kind}.j2" %}}\n{{% block content %}}\n{content}\n{{% endblock %}}'
    loader = ChoiceLoader([DictLoader({"test.j2": template}), FileSystemLoader(TEMPLATES)])
    return render(SimpleNamespace(title=title, **values), kind, "test.j2", loader)
