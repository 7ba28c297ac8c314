"""Score models on tasks: metrics, statistics, one evaluation run, and the leaderboard.

The one idea: a score is *evidence a row* folded by a metric. Every metric turns one prediction into a short vector of numbers (a right answer is
`[1]`, an entity row is `[shared, predicted, gold]`), and an aggregate over those vectors gives the value. So the standard error, the test against
the base and the stored record need no second definition of any metric.

    metrics.py      what a metric is, and the registry: `metric_for(task)`
    row_metrics.py  metrics that are means over rows (accuracy, exact match, ROUGE-L, SQL execution, code)
    corpus_metrics.py  metrics of the whole test set (span F1, correlations, F1 of classes)
    matching.py     when two answers are the same: text, number, SQL, JSON
    sql.py          SQL normalisation, and running a query on a throw-away database behind a guard
    sandbox.py      running model-written Python, only when it is allowed
    stats.py        standard errors and paired tests
    evaluate.py     one model on one task through an engine: requests, options, scores
    score.py        Score and RowOutput, and their files
    baseline.py     what answering without reading gets
    leaderboard.py  leaderboard.json and leaderboard.md

Importing any of it imports no torch. Used by workflows and the command line.
"""
