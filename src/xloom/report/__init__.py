"""The interactive report: prompts in, one HTML file out that shows how the experts were mixed.

    asks = read_asks("prompts.jsonl")                    what the model is asked            asks.py
    findings = find(model, tokenizer, asks)              traces, contributions, worth       findings.py
    write_report(findings, path, command="xloom ...")    numbers -> one file                numbers.py, maps.py, html.py

What the page is made of lies in `page/`: `page.html.j2` has its parts in their order, `style.css` its look, and each
part is drawn by the script of its name. The scripts draw; every number comes from `xloom.seeing`.
"""

from xloom.report.asks import Ask, read_asks, read_traces
from xloom.report.findings import Findings, find, read_again
from xloom.report.html import check_plotly, write_report

__all__ = ["Ask", "Findings", "check_plotly", "find", "read_again", "read_asks", "read_traces", "write_report"]
