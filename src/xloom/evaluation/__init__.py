"""Tasks x systems: how well a mixture answers, against every other way to use the same experts.

    tasks = load_tasks({"quantum": "suite/quantum", "mine": "mine.jsonl"}, scorer="exact")
    systems = find_systems(["all"], model)
    evaluation = evaluate(model, tokenizer, tasks, systems, output=Path("runs/eval"))
    evaluation.rows()

The files, in the order in which a run passes through them:

    scorers     from an answer to a grade                tasks       what is asked
    decoding    fast greedy answers                      shots       what training rows give to simple systems
    bench       what systems share; systems; registry    store       answers kept in files
    run         evaluate                                 statistics  means, intervals
    results     flat rows                                report, plot  for reading
"""

from xloom.evaluation.answers import answers, losses
from xloom.evaluation.bench import Bench
from xloom.evaluation.registry import all_names, find_systems
from xloom.evaluation.results import Evaluation
from xloom.evaluation.run import Watch, evaluate
from xloom.evaluation.scorers import Grade, Scorer, find_scorer
from xloom.evaluation.systems import System
from xloom.evaluation.tasks import Question, Task, load_tasks

__all__ = [
    "Bench",
    "Evaluation",
    "Grade",
    "Question",
    "Scorer",
    "System",
    "Task",
    "Watch",
    "all_names",
    "answers",
    "evaluate",
    "find_scorer",
    "find_systems",
    "load_tasks",
    "losses",
]
