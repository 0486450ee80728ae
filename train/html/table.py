"""A table of HTML, in the page's style."""

from collections.abc import Sequence

from train.html.escaping import shown


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False) -> str:
    """A table whose first column is text; the others are set as numbers where all of theirs look so."""
    numeric = [
        column > 0 and all(row[column][:1].isdigit() or not row[column] for row in rows) for column in range(len(head))
    ]
    kinds = [' class="n"' if is_number else "" for is_number in numeric]
    lines = ["".join(f"<th{kind}>{shown(name)}</th>" for kind, name in zip(kinds, head, strict=True))]
    for row in rows:
        cells = row if escaped else [shown(cell) for cell in row]
        lines.append("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True)))
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
