"""summary.json as a person reads it."""

from rich.table import Table


def table(summary: dict) -> Table:
    out = Table(title=f"{summary['recipe']}, seed {summary['seed']}: accuracy on {summary['test_images']} test images")
    for column, justify in (("", "left"), ("classes", "right"), ("parameters", "right"), ("accuracy %", "right")):
        out.add_column(column, justify=justify)
    for name, teacher in summary["teachers"].items():
        out.add_row(f"teacher {name}", str(len(teacher["classes"])), f"{teacher['parameters']:,}",
                    "-" if teacher["accuracy"] is None else f"{100 * teacher['accuracy']:.1f}")
    out.add_section()
    for name, student in summary["students"].items():
        out.add_row(f"student {name}", "all", f"{student['parameters']:,}", f"{100 * student['accuracy']:.1f}")
    out.add_section()
    out.add_row("ensemble of students", "all", f"{summary['ensemble']['parameters']:,}",
                f"{100 * summary['ensemble']['accuracy']:.1f}")
    return out
