"""What machines read off an archive, kept beside it as Parquet that joins by key.

    archive ── one view of each row ──> Task ──> analysis/<task>-<hash>/<unit>.parquet
                                                          │
                        index, or those results ──> Survey ──> analysis/<survey>-<hash>/<table>.parquet

A task looks at rows, a survey at a whole snapshot. Both are classes, the user's own too
(:mod:`dicmh_ray.analysis.task`). :func:`dicmh_ray.ray_plugin.analysis.analyze` runs them on Ray or in
this process; what was done is never done again.
"""

from dicmh_ray.analysis.catalog import BUILT_IN, TaskOptions, load_task
from dicmh_ray.analysis.head_task import LatentHeadTask
from dicmh_ray.analysis.heads import HeadReport, fit_head
from dicmh_ray.analysis.latent_tasks import EmbedLatent
from dicmh_ray.analysis.near_duplicates import NearDuplicates
from dicmh_ray.analysis.net_tasks import (
    Classify,
    Detect,
    EmbedPicture,
    FindFaces,
    FindLandmarks,
    Segment,
)
from dicmh_ray.analysis.results import Results, list_results, read_results
from dicmh_ray.analysis.run import (
    Analysis,
    AnalysisOptions,
    AnalysisReport,
    Forecast,
    analyze_local,
    forecast,
    plan_analysis,
)
from dicmh_ray.analysis.survey import Survey, read_survey, run_survey
from dicmh_ray.analysis.tag_statistics import TagStatistics
from dicmh_ray.analysis.task import Batch, Task

__all__ = [
    "BUILT_IN",
    "Analysis",
    "AnalysisOptions",
    "AnalysisReport",
    "Batch",
    "Classify",
    "Detect",
    "EmbedLatent",
    "EmbedPicture",
    "FindFaces",
    "FindLandmarks",
    "Forecast",
    "HeadReport",
    "LatentHeadTask",
    "NearDuplicates",
    "Results",
    "Segment",
    "Survey",
    "TagStatistics",
    "Task",
    "TaskOptions",
    "analyze_local",
    "fit_head",
    "forecast",
    "list_results",
    "load_task",
    "plan_analysis",
    "read_results",
    "read_survey",
    "run_survey",
]
