"""HTML pages about runs and sweeps: templates over one layout, page.html, and written as one file each."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """The page that a template below librobot/training makes of `values`, styles inside; it needs `title`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("librobot.training", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
