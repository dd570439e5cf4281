"""Forms of dates, numbers, codes, places and ages: what is found, what is left alone, and that no rule is skipped."""

import random

import pytest

from medai_nb.phi import detect as detection
from medai_nb.phi import names, patterns
from medai_nb.phi.detect import detect
from medai_nb.phi.patterns import Prefilter

# (text, what must be covered)
FOUND = [
    ("Seen Friday 4/26 with her aunt", "Friday 4/26"),
    ("The denial dated 11/02 of the chair", "11/02"),
    ("Login on 3-3 and nobody knows", "3-3"),
    ("Born 2016/11/3 in the taxi", "2016/11/3"),
    ("DOB 06JUN1947 per card", "06JUN1947"),
    ("Onset 29/SEP/2024 03:10", "29/SEP/2024"),
    ("Birth date 1989.04.02", "1989.04.02"),
    ("Cultures drawn on the 11th grew staph", "the 11th"),
    ("Back on Monday the 8th, she said", "Monday the 8th"),
    ("november third nineteen sixty", "november third nineteen sixty"),
    ("He died on Mardi Gras 2022", "Mardi Gras 2022"),
    ("Member ID ......... 881-22-0475A", "881-22-0475A"),
    ("my member number is QRS 300 774 812. Thanks", "QRS 300 774 812"),
    ("License No.: T14 77 20934  Age", "T14 77 20934"),
    ("The incident # 23-118840 stands", "23-118840"),
    ("security tag TAGS 11930 match", "TAGS 11930"),
    ("Last4: 8816", "8816"),
    ("transmitter 8GX4TL on the arm", "8GX4TL"),
    ("chart. Should be 0199-3384, not the other", "0199-3384"),
    ("Subjects MH-001 and MH-002 enrolled", "MH-002"),
    ("Pt in 4W-12B pulled the line", "4W-12B"),
    ("Sample 24015-KK-90331 came late", "24015-KK-90331"),
    ("My cell is 417 5520193 thanks", "417 5520193"),
    ("call three one four five five five oh one nine nine", "three one four five five five oh one nine nine"),
    ("The letter is at portal.kite.example/fam/02217 now", "portal.kite.example/fam/02217"),
    ("hxxp://dropbin.example/u/zz91 was the link", "hxxp://dropbin.example/u/zz91"),
    ("See DSC_0917.NEF for the wound", "DSC_0917.NEF"),
    ("A white Corolla, BZN 4471, in the bay", "BZN 4471"),
    ("Helicopter N417HX on the pad", "N417HX"),
    ("Her grandmother is 97 and well", "97"),
    ("Mum, 94, fell at home", "94"),
    ("F/93 with a cough", "93"),
    ("It was her 101st birthday", "101st"),
    ("id,sex,age\nT1,M,91,yes", "91"),
    ("Follow-up at Kestrel Burn Center tomorrow", "Kestrel Burn Center"),
    ("She works at Kestrel Steel Fabricators", "Kestrel Steel Fabricators"),
    ("He lives in Otter Hollow, near us", "Otter Hollow"),
    ("samples at the Kestrel Road office", "Kestrel Road"),
    ("Admitted to 3 West overnight", "3 West"),
    ("Found at mile marker 88, Route 9", "mile marker 88, Route 9"),
    ("PATIENT NAME: ADEWUYI, FOLASHADE R.", "ADEWUYI, FOLASHADE R"),
    ("Student: Amarachi Ezeani   Grade: 3", "Amarachi Ezeani"),
    ("Ostrovska 77F UTI, sitter", "Ostrovska"),
]  # fmt: skip

LEFT_ALONE = [
    "Strength 5/5, reflexes 2/4, murmur 3/6, pain 7/10.",
    "About 2/3 of patients, nearly 9/10, took 1/2 tablet.",
    "BP 124/90, HR 98, RR 20, SpO2 92 on room air, glucose 110.",
    "CA-125 was 9; PD-L1 50%; HLA-B27 negative; COVID-19 twice; H1N1; L4-L5 disc.",
    "Give 1500-2000 mL over 24 h, then 500 mg x 3 days.",
    "the 4th rib, the 2nd and 3rd fingers, the 95th percentile, the 3rd day",
    "the Intensive Care Unit, the Emergency Department, Internal Medicine",
    "Pulse, 92, regular; Sodium, 120, low; BP (95) low.",
    "HbA1c and QTc with an AirSense, MoCA 27/30, eGFR 45.",
    "Staphylococcus, Bartonella and Helicobacter grew; Zoloft, Dexcom and Medtronic.",
    "POD 2 after the operation, on HD 4.",
]


@pytest.mark.parametrize(("text", "value"), FOUND, ids=[value for _, value in FOUND])
def test_form_is_covered_whole(text, value):
    start = text.index(value)
    covered = {offset for span in detect(text) for offset in range(span.start, span.end)}
    missed = [offset for offset in range(start, start + len(value)) if offset not in covered]
    assert not any(text[offset].isalnum() for offset in missed), [
        (text[span.start : span.end], span.reason) for span in detect(text)
    ]


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_measurements_and_terms_stay(text):
    assert [(text[span.start : span.end], span.reason) for span in detect(text)] == []


def mixed_text(seed: int) -> str:
    """Pieces of identifiers, words and signs in any order, some of them outside ASCII."""
    generator = random.Random(seed)
    pieces = [text for text, _ in FOUND] + LEFT_ALONE
    words = " ".join(pieces).split() + [
        "naïve",
        "Ångström’s",
        "–",
        "\u00a0",
        "œdème",
        "٣٤",
        "\ufffc",
        "mg",
        "\n",
    ]
    return " ".join(generator.choice(words) for _ in range(60))


@pytest.mark.parametrize("seed", range(40))
def test_the_prefilter_never_hides_a_match(seed):
    text = mixed_text(seed)
    for rules, possible in (
        ([shape.regex for shape in patterns._SHAPES], patterns._possible_shapes()),
        ([shape.regex for shape in patterns._AGE_SHAPES], patterns._possible_ages()),
        (detection._PLACE_RULES, detection._possible_places()),
    ):
        candidates = set(possible(text))
        hidden = [
            rule.pattern[:60]
            for place, rule in enumerate(rules)
            if place not in candidates and rule.search(text)
        ]
        assert hidden == []


def test_the_prefilter_names_every_offset_before_which_a_cue_ends():
    text = "Seen by Ann. Dear Bob, spoke with  Cid; Name: Dee. re: Eve"
    ends = names.cue_ends(text)
    assert {text.index(name) for name in ("Ann", "Bob", "Cid", "Dee", "Eve")} <= ends


def test_the_prefilter_refuses_what_it_cannot_test():
    import re

    with pytest.raises(ValueError, match="not in ASCII"):
        Prefilter([re.compile("é")])


def test_threads_do_not_share_the_prefilters_memory():
    from concurrent.futures import ThreadPoolExecutor

    texts = [mixed_text(seed) for seed in range(24)]
    expected = [detect(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detect, texts)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_what_a_shape_needs_is_in_all_that_it_matches(seed):
    generator = random.Random(seed)
    tokens = ["".join(generator.choices("ABZ019", k=generator.randint(6, 22))) for _ in range(300)]
    joins = ("to", "until", "through")
    tokens += [
        f"{generator.choice(('', 'the '))}{generator.randint(1, 31)} {generator.choice(joins)} {generator.randint(1, 31)} {month}"
        for month in ("May", "of June", "Sept. 2021") * 5
    ]
    for shape in patterns._SHAPES:
        if shape.needs:
            matching = [token for token in tokens if shape.regex.search(token)]
            assert matching and all(shape.needs.search(token) for token in matching)


def test_names_are_followed_alike_in_texts_with_and_without_other_letters():
    text = "Mr. Smith-Jones came. SMITH-JONES, jones and smith; Jonesy, smith_1, Mr. Smith."
    values = ["smith-jones", "smith", "jones"]
    plain = [text[start:end] for start, end in detection._occurrences(text, values)]
    assert plain == ["Smith-Jones", "SMITH-JONES", "jones", "smith", "Smith"]
    assert list(detection._occurrences(text + " é", values)) == list(detection._occurrences(text, values))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Since build 10.4.2.118 the viewer throws error 0xA700.", []),
        ("firmware 4.2.11.7, address 10.2.3.4", ["10.2.3.4"]),
        ("Claim bounced: 20610-RT with 99214-25 on 99213", []),
        ("Reference GLI-2012, grade B.", []),
        ("clinic note on zawadi, that's z a w a d i", ["z a w a d i"]),
        ("Lurleen Cutshaw, c-u-t-s-h-a-w, over on the hill", ["c-u-t-s-h-a-w"]),
        ("grades a-b-c-d and letters n o n e", []),
        ("back to work the first wk of Dec, review mi-juin", ["the first wk of Dec", "mi-juin"]),
        ("seen le 4 avril 2021", ["4 avril 2021"]),
        ("transferred from HMP Saltmarsh at noon", ["Saltmarsh"]),
    ],
)
def test_codes_of_programs_and_bills_stay_and_spelled_names_go(text, found):
    spans = [*patterns.shaped_values(text), *patterns.labelled_values(text)]
    assert [text[span.start : span.end] for span in spans] == found
