"""Recommendation: which item of each user is held out, and how well an order of items would have guessed it."""

from fedsim.ranking.counting import chosen, popularity, recommends, users
from fedsim.ranking.evaluation import RankItems, Scorer
from fedsim.ranking.measures import hit_rate, ndcg, rank
from fedsim.ranking.naming import MOSTPOP, PART, Measure, beside, foremost, is_ranking, ranked, usual
from fedsim.ranking.negatives import draw_negatives, draw_others
from fedsim.ranking.splitting import DRAWN, KNOWN, WANTED, leave_one_out

__all__ = [
    "DRAWN",
    "KNOWN",
    "MOSTPOP",
    "PART",
    "WANTED",
    "Measure",
    "RankItems",
    "Scorer",
    "beside",
    "chosen",
    "draw_negatives",
    "draw_others",
    "foremost",
    "hit_rate",
    "is_ranking",
    "leave_one_out",
    "ndcg",
    "popularity",
    "rank",
    "ranked",
    "recommends",
    "users",
    "usual",
]
