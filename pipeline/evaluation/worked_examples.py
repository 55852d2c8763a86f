"""Eight worked word problems for the few-shot protocol `cot_8shot_own`, written for this project."""

WORKED_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "A beekeeper has 6 hives. Each hive gives 14 jars of honey, and she keeps 9 jars for her family. How many "
        "jars can she sell?",
        "The 6 hives give 6 * 14 = 84 jars. She keeps 9 of them, so 84 - 9 = 75 are left. The answer is 75.",
    ),
    (
        "A tram leaves the depot with 17 passengers. At the first stop 5 get off and 11 get on. At the second "
        "stop 8 get off. How many passengers are on the tram then?",
        "After the first stop there are 17 - 5 + 11 = 23 passengers. After the second stop there are 23 - 8 = 15. "
        "The answer is 15.",
    ),
    (
        "Paint costs $18 a can, and one can covers 30 square metres. How much does the paint for 150 square "
        "metres cost?",
        "150 square metres need 150 / 30 = 5 cans. They cost 5 * 18 = 90 dollars. The answer is 90.",
    ),
    (
        "Ines is three times as old as her brother, who is 4. How old will Ines be in 6 years?",
        "Her brother is 4, so Ines is 3 * 4 = 12. In 6 years she will be 12 + 6 = 18. The answer is 18.",
    ),
    (
        "A printer makes 40 pages a minute for the first 3 minutes and then 25 pages a minute for 4 minutes. How "
        "many pages does it make?",
        "In the first 3 minutes it makes 3 * 40 = 120 pages. In the next 4 minutes it makes 4 * 25 = 100 pages. "
        "Together that is 120 + 100 = 220. The answer is 220.",
    ),
    (
        "A coat costs $80. It is reduced by 25%, and then a $7 voucher is taken off. What does it cost in the end?",
        "25% of 80 is 20, so the coat costs 80 - 20 = 60 dollars. With the voucher it costs 60 - 7 = 53 dollars. "
        "The answer is 53.",
    ),
    (
        "Two ropes are 45 metres long together. One is 9 metres longer than the other. How long is the shorter rope?",
        "Without the 9 extra metres the ropes would be equally long and measure 45 - 9 = 36 metres together. Half "
        "of that is 36 / 2 = 18. The answer is 18.",
    ),
    (
        "A class of 28 pupils is taken to the museum in cars that hold 4 pupils each. Every car needs 2 hours "
        "there and back at $3 an hour for parking. What does parking cost in all?",
        "28 pupils need 28 / 4 = 7 cars. Each car pays 2 * 3 = 6 dollars. In all that is 7 * 6 = 42 dollars. The "
        "answer is 42.",
    ),
)
"""(question, solution); a solution ends in `The answer is N.`"""
