"""Text in rows and columns."""

NO_METRICS = ("examples", "num_fewshot", "version")  # keys of a task's results that are not metrics


def table(header, rows):
    """Lay out rows of text under a header, the first column left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells):
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
