"""Make src/xloom/suite/data/general.json: what the built-in base can do by itself, before anything is mixed into it.

Takes the questions and topics below, asks the base once (greedy), and keeps: of the facts, those it gets right and
enough of the others that its score lies where it can fall and rise; of the chat prompts, those that it answers to
the end within a few tokens. Run it from the repository's root (about ten minutes on one core):

    python scripts/make_general.py
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xloom.hub.base_model import BUILTIN_BASE, GGUF_SHA256, builtin_base

TARGET = Path("src/xloom/suite/data/general.json")
NEW_TOKENS = 24
BATCH = 16
FACTS = {"valid": 40, "test": 110}
TALK = {"train": 250, "valid": 50, "test": 100}
RIGHT_SHARE = 0.75  # of the facts kept, as far as the base gets so many right

# question | any of these answers, split by "/"
QUESTIONS = """
What is the capital of France? | Paris
What is the capital of Italy? | Rome
What is the capital of Spain? | Madrid
What is the capital of Germany? | Berlin
What is the capital of Japan? | Tokyo
What is the capital of China? | Beijing
What is the capital of Russia? | Moscow
What is the capital of Egypt? | Cairo
What is the capital of Greece? | Athens
What is the capital of Portugal? | Lisbon
What is the capital of Austria? | Vienna
What is the capital of England? | London
What is the capital of Ireland? | Dublin
What is the capital of Norway? | Oslo
What is the capital of Sweden? | Stockholm
What is the capital of Poland? | Warsaw
What is the capital of India? | Delhi
What is the capital of Canada? | Ottawa
What is the capital of Cuba? | Havana
What is the capital of Kenya? | Nairobi
What is the capital of Turkey? | Ankara
What is the capital of Argentina? | Buenos Aires
What is the capital of Thailand? | Bangkok
What is the capital of the United States? | Washington
Name the capital of Belgium. | Brussels
Name the capital of Denmark. | Copenhagen
Name the capital of Hungary. | Budapest
Name the capital of Peru. | Lima
In which country is Paris? | France
In which country is Tokyo? | Japan
In which country is Sydney? | Australia
In which country are the pyramids of Giza? | Egypt
In which country is Rome? | Italy
On which continent is Brazil? | South America
On which continent is Nigeria? | Africa
On which continent is China? | Asia
On which continent is Germany? | Europe
Which country is famous for the Eiffel Tower? | France
Which ocean lies between Europe and America? | Atlantic
Which is the largest ocean? | Pacific
Which is the longest river in Africa? | Nile
What is the highest mountain in the world? | Everest
What is the opposite of hot? | cold/cool
What is the opposite of big? | small/little
What is the opposite of up? | down
What is the opposite of good? | bad/evil
What is the opposite of day? | night
What is the opposite of fast? | slow
What is the opposite of old? | young/new
What is the opposite of happy? | sad/unhappy
What is the opposite of rich? | poor
What is the opposite of left? | right
What is the opposite of open? | closed/close/shut
What is the opposite of early? | late
What is the opposite of light? | dark/darkness/heavy
What is the opposite of wet? | dry
What is the opposite of full? | empty
What is the opposite of strong? | weak
What is the opposite of true? | false
What is the opposite of yes? | no
What color is the sky on a clear day? | blue
What color is grass? | green
What color is snow? | white
What color is a ripe banana? | yellow
What color is blood? | red
What color is coal? | black
What color is a carrot? | orange
What color is milk? | white
What color do you get from red and white? | pink
What color do you get from blue and yellow? | green
What is 1 + 1? | 2/two
What is 2 + 2? | 4/four
What is 2 + 3? | 5/five
What is 5 + 5? | 10/ten
What is 3 + 4? | 7/seven
What is 10 + 10? | 20/twenty
What is 6 + 2? | 8/eight
What is 5 - 2? | 3/three
What is 10 - 1? | 9/nine
What is 8 - 4? | 4/four
What is 2 times 3? | 6/six
What is 5 times 2? | 10/ten
What is 3 times 3? | 9/nine
What is 10 times 10? | 100/hundred
What is half of 10? | 5/five
What is half of 8? | 4/four
What is twice 6? | 12/twelve
Which number comes after 7? | 8/eight
Which number comes after 19? | 20/twenty
Which number comes before 5? | 4/four
Which number is larger, 3 or 9? | 9/nine
How many days are in a week? | 7/seven
How many months are in a year? | 12/twelve
How many hours are in a day? | 24/twenty-four
How many minutes are in an hour? | 60/sixty
How many seconds are in a minute? | 60/sixty
How many days are in a normal year? | 365
How many legs does a dog have? | 4/four
How many legs does a spider have? | 8/eight
How many legs does an insect have? | 6/six
How many wheels does a bicycle have? | 2/two
How many sides does a triangle have? | 3/three
How many sides does a square have? | 4/four
How many fingers are on one hand? | 5/five
How many letters are in the English alphabet? | 26/twenty-six
How many continents are there? | 7/seven
How many players are in a soccer team on the field? | 11/eleven
Which day comes after Monday? | Tuesday
Which day comes after Wednesday? | Thursday
Which day comes after Friday? | Saturday
Which day comes before Sunday? | Saturday
Which day comes before Wednesday? | Tuesday
What is the first day of the weekend? | Saturday
What is the first month of the year? | January
What is the last month of the year? | December
Which month comes after March? | April
Which month comes after June? | July
Which month comes before October? | September
In which month is Christmas? | December
In which month is Halloween? | October
Which season comes after winter? | spring
Which season is the coldest? | winter
Which season is the warmest? | summer
In which season do leaves fall? | autumn/fall
Which animal barks? | dog/dogs
Which animal says meow? | cat/cats
Which animal gives us milk? | cow/cows/goat
Which animal has a long trunk? | elephant/elephants
Which animal has a very long neck? | giraffe/giraffes
Which animal is called the king of the jungle? | lion
Which insect makes honey? | bee/bees/honeybee/honeybees
Which bird cannot fly and lives at the South Pole? | penguin/penguins
Which animal has black and white stripes? | zebra/zebras
Which animal lays eggs on a farm? | chicken/chickens/hen/hens
What is the largest animal on Earth? | whale
What is the fastest land animal? | cheetah
What is a baby dog called? | puppy/pup
What is a baby cat called? | kitten
What is a baby cow called? | calf
What do bees make? | honey
What do cows eat? | grass/hay
What do fish breathe with? | gills
What do we call frozen water? | ice
What do plants need from the sun? | light/sunlight/energy
What falls from clouds when it rains? | water/rain/raindrops
What do you use to write on paper? | pen/pencil/pens/pencils
What do you use to cut paper? | scissors/knife
What do you wear on your feet? | shoes/socks
What do you wear on your head? | hat/cap/helmet
What do you use to see? | eyes/eye
What do you use to hear? | ears/ear
Which organ pumps blood? | heart
Which planet do we live on? | Earth
Which planet is known as the red planet? | Mars
Which is the largest planet? | Jupiter
Which star is nearest to Earth? | Sun
What goes around the Earth and shines at night? | Moon
Who wrote Romeo and Juliet? | Shakespeare
Who painted the Mona Lisa? | Leonardo/Vinci
Who was the first president of the United States? | Washington
Who was the first man on the Moon? | Armstrong
Who invented the telephone? | Bell
Who developed the theory of relativity? | Einstein
Which language is spoken in Brazil? | Portuguese
Which language is spoken in Mexico? | Spanish
Which language is spoken in France? | French
Which language is spoken in Austria? | German
How do you say hello in Spanish? | hola
How do you say thank you in French? | merci
How do you say yes in German? | ja
How do you say water in Spanish? | agua
How do you say cat in French? | chat
How do you say goodbye in Spanish? | adios/adiós
How do you say good day in French? | bonjour
Translate to English: hola | hello/hi
Translate to English: gracias | thank/thanks
Translate to English: bonjour | hello/good day/good morning
Translate to Spanish: house | casa
Translate to French: love | amour
What is the plural of mouse? | mice
What is the plural of child? | children
What is the plural of book? | books
What is the plural of foot? | feet
What is the past tense of go? | went
What is the past tense of eat? | ate
What is the past tense of run? | ran
Which letter comes after A? | B
Which letter comes after C? | D
What is the last letter of the alphabet? | Z
Which word rhymes with cat: hat or dog? | hat
Which word is spelled right: recieve or receive? | receive
Is fire hot or cold? | hot
Is ice hot or cold? | cold
Is the sun hot? Answer yes or no. | yes
Can fish live in water? Answer yes or no. | yes
Is an elephant larger than a mouse? Answer yes or no. | yes
Can a stone swim? Answer yes or no. | no
What is the main ingredient of bread? | flour
Which fruit is used to make wine? | grape/grapes
Which sport is played at Wimbledon? | tennis
What is the currency of Japan? | yen
What is the currency of the United States? | dollar/dollars
Which instrument has 88 keys? | piano
"""

TEMPLATES = (
    "Write one short sentence about {}.",
    "Tell me one thing about {} in a few words.",
    "Give me a short title for a story about {}.",
    "Say something nice about {} in five words.",
    "Ask me one short question about {}.",
    "Give one piece of advice about {}, in one short sentence.",
    "Name three words that go with {}.",
    "Why do people like {}? One short reason, please.",
    "Explain {} to a child in one short sentence.",
    "List three things about {}, separated by commas.",
    "Write a friendly greeting to someone who likes {}.",
    "Summarise {} in a few words.",
    "I like {}. And you?",
    "Make a short slogan for {}.",
)
TOPICS = {
    "train": (
        "tea, rain, dogs, bread, music, trains, summer, friendship, football, books, the sea, gardens, coffee, "
        "mountains, birthdays, bicycles, apples, winter, dancing, photography, cats, chess, soup, camping, sleep, "
        "letters, rivers, horses, painting, honesty, markets, clouds, cinema, cheese, running, museums, forests, "
        "poetry, shoes, islands, homework, kites, weddings, pizza, umbrellas, neighbours, holidays, snow, teachers, "
        "bridges, silence, candles, breakfast, patience, swimming, castles, newspapers, jokes, roses, clocks, "
        "tomatoes, airports, gratitude, jazz, tents, ducks, milk, postcards, hiking, owls, comedy, balloons, "
        "pillows, monkeys, drums, lighthouses, picnics, grandmothers"
    ),
    "valid": (
        "chocolate, lakes, kindness, guitars, autumn, buses, libraries, pancakes, courage, tennis, deserts, hats, "
        "puppies, lemonade, stars"
    ),
    "test": (
        "oranges, beaches, laughter, sailing, spring, cooking, theatres, rabbits, trust, mirrors, fishing, villages, "
        "ice cream, yoga, sunsets, parents, pianos, trees, stories, basketball, mushrooms, hope, ferries, blankets, "
        "parades, butterflies, curiosity, potatoes"
    ),
}
EACH = 7  # prompts of one topic


def facts() -> Iterator[dict[str, Any]]:
    """The questions above, each with its right answers."""
    for line in QUESTIONS.strip().splitlines():
        question, answers = line.split(" | ")
        yield {"prompt": question, "any": answers.split("/")}


def talk() -> Iterator[dict[str, Any]]:
    """Chat prompts; no topic is in two splits, and every wording is met equally often."""
    place = 0
    for split, topics in TOPICS.items():
        for topic in topics.split(", "):
            for _ in range(EACH):
                # 5 and 14 have no common divisor: a topic meets seven wordings, and all come round
                yield {"prompt": TEMPLATES[5 * place % len(TEMPLATES)].format(topic), "split": split}
                place += 1


def answers_of_base(prompts: Sequence[str]) -> list[tuple[str, bool]]:
    """The base's greedy answer to each prompt, and whether it ended by itself within NEW_TOKENS."""
    folder = builtin_base()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    order = sorted(range(len(chats)), key=lambda index: len(chats[index]))
    found: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = tokenizer([chats[index] for index in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        for index, ids in zip(batch, out[:, inputs.input_ids.shape[1] :], strict=True):
            ended = tokenizer.eos_token_id in ids
            found[index] = tokenizer.decode(ids, skip_special_tokens=True).strip(), bool(ended)
        print(f"{start + len(batch)} of {len(order)}", flush=True)
    return [found[index] for index in range(len(prompts))]


def is_right(answer: str, any_of: Sequence[str]) -> bool:
    """Whether one of the right answers is in the text as whole words, case aside."""
    return any(re.search(rf"(?<!\w){re.escape(right)}(?!\w)", answer, re.IGNORECASE) for right in any_of)


def place(text: str) -> str:
    """A digest to order by: no matter how the lists above are ordered."""
    return hashlib.sha256(f"general:{text}".encode()).hexdigest()


def chosen_facts(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Facts with their split, in each one the same share that the base gets right."""
    right, wrong = (
        sorted((f for f in asked if f["right"] is r), key=lambda f: place(f["prompt"])) for r in (True, False)
    )
    share = min(RIGHT_SHARE, len(right) / sum(FACTS.values()))
    kept = []
    for split, size in FACTS.items():
        many = int(size * share)
        for pool, count in ((right, many), (wrong, size - many)):
            kept += [{**fact, "split": split} for fact in pool[:count]]
            del pool[:count]
    return kept


def chosen_talk(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each split so many as TALK says, those that the base ended by itself."""
    kept = []
    for split, size in TALK.items():
        ended = [row for row in asked if row["split"] == split and row["ended"] and row["answer"]]
        print(f"{split}: {len(ended)} prompts answered to the end, {size} wanted")
        kept += sorted(ended, key=lambda row: place(row["prompt"]))[:size]
    return [{key: row[key] for key in ("prompt", "answer", "split")} for row in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument(
        "--answers", type=Path, help="JSON file to keep the base's answers in; those there are not asked"
    )
    options = parser.parse_args()
    questions, prompts = list(facts()), list(talk())
    heard = json.loads(options.answers.read_text()) if options.answers and options.answers.exists() else {}
    new = [row["prompt"] for row in questions + prompts if row["prompt"] not in heard]
    heard |= dict(zip(new, answers_of_base(new) if new else [], strict=True))
    if options.answers:
        options.answers.write_text(json.dumps(heard, indent=1))
    asked = [
        {**row, "answer": heard[row["prompt"]][0], "ended": heard[row["prompt"]][1]} for row in questions + prompts
    ]
    known = [{**row, "right": is_right(row["answer"], row["any"])} for row in asked[: len(questions)]]
    print(f"facts: {sum(row['right'] for row in known)} of {len(known)} right")
    kept = {"facts": chosen_facts(known), "talk": chosen_talk(asked[len(questions) :])}
    for row in kept["facts"]:
        del row["ended"]
    about = {"base": BUILTIN_BASE, "gguf_sha256": GGUF_SHA256, "new_tokens": NEW_TOKENS, "decoding": "greedy, float32"}
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows) + "\n ]"
        for name, rows in kept.items()
    ]
    options.out.write_text('{\n "about": ' + json.dumps(about) + ",\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
