"""Write the demo's data: requests in plain English and the smart-home commands that answer them.

The request

    Could you remind me to call the plumber on Friday at half past six in the evening?

becomes the command

    {"do": "remind", "what": "call the plumber", "when": "Friday 6:30 pm"}

There are five kinds of requests: reminders, table bookings, text messages, timers and lights.
A model has to choose the right kind, copy names and phrases letter for letter, turn
number words into digits ("thirty five" -> 35) and spoken times into clock times ("quarter past
eight in the evening" -> 8:15 pm).

Memorizing the training set does not help on the test set: every person, restaurant, chore,
message, dish and room in it is new.  `python make_data.py` writes `train.jsonl` and `test.jsonl`
next to this file, and writes the same bytes each time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

TRAIN_ROWS = 400
TEST_ROWS = 50
SEED = 7

Command = dict[str, str | int]
Request = tuple[str, Command]


@dataclass(frozen=True)
class Words:
    """The words one set of requests is made of; the two sets below share none."""

    people: list[str]
    restaurants: list[str]
    chores: list[str]
    messages: list[str]
    dishes: list[str]
    rooms: list[str]


def listed(text: str) -> list[str]:
    """Split a comma-separated list, which may run over several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


TRAIN_WORDS = Words(
    people=listed(
        """Anna, Ben, Carla, David, Emma, Frank, Grace, Henry, Isabel, Jack, Kate, Leo, Martha,
        Nadia, Oscar, Paula, Robert, Sofia, Thomas, Victor, Wendy, Yusuf, Mum, Grandpa, Aunt Rose,
        Mr. Miller, Priya, Chen, Fatima, Lars, Ingrid, Pablo, Aisha, Hiroshi, Claire, Bruno"""
    ),
    restaurants=listed(
        """Bella Roma, The Golden Lion, Sakura, Blue Lagoon, Casa Pepe, The Old Mill, Taj Palace,
        Le Jardin, Green Garden, Pizza Corner, The Red Door, Bombay House, Chez Marie,
        The Oak Tree, El Toro, Noodle Bar, Riverside Grill, Athena, The Ship, Little Saigon,
        Trattoria Mia, The Blue Whale, Cafe Central, Hanoi Street, The Fox, Burger Barn,
        La Perla, Lotus Garden, The White Rose, Harbor View"""
    ),
    chores=listed(
        """water the plants, call the dentist, pay the rent, feed the cat, take out the trash,
        buy milk, renew my passport, wash the car, return the library books, book the flights,
        clean the oven, pick up the kids, charge my phone, order new shoes, walk the dog,
        send the invoice, visit Grandma, change the bed sheets, check the mail, bake a cake,
        cancel the gym, pack my suitcase, sign the contract, iron my shirts, mow the lawn,
        vacuum the stairs, thank Uncle Joe, defrost the freezer, study for the exam, sell my bike"""
    ),
    messages=listed(
        """I am running late, dinner is ready, the train is delayed, I will be home soon,
        the meeting is over, we need more bread, the door is open, I love the gift,
        the car is fixed, my phone is broken, we won the game, the kids are asleep,
        I forgot my wallet, the bus just left, it is raining here, I found the keys,
        the store is closed, we are at the beach, I need a ride, the show starts soon,
        lunch was great, my flight got canceled, the doctor called back, she said yes,
        they moved to Berlin, the parcel has arrived, our team lost, you can come over"""
    ),
    dishes=listed(
        """pasta, eggs, rice, bread, chicken, tea, potatoes, soup, cookies, pizza, fish, beans,
        apple pie, roast beef, muffins, lentils, curry, coffee, pancakes, green beans, waffles,
        meatballs, dumplings, pork chops, mushrooms, garlic bread, zucchini, quiche, brownies,
        cauliflower, stew, risotto, sausages, tofu, onion rings, cheesecake"""
    ),
    rooms=listed(
        """kitchen, bedroom, living room, bathroom, garage, hallway, office, attic, basement,
        garden, dining room, laundry room, guest room, porch, workshop, staircase, lobby, closet,
        sunroom, family room, music room, gym, driveway, greenhouse, shed, waiting room,
        master bedroom, terrace, stable, corridor"""
    ),
)

TEST_WORDS = Words(
    people=listed(
        """Maria, Peter, Lucy, Omar, Julia, Simon, Hannah, Diego, Alice, Uncle Sam, Mrs. Brown,
        Kenji"""
    ),
    restaurants=listed(
        """Villa Verde, The Black Horse, Tokyo Kitchen, Sunset Grill, Casa Luna, The Lighthouse,
        Curry Temple, Golden Dragon, Mama Rosa, The Green Door"""
    ),
    chores=listed(
        """call the plumber, buy flowers, feed the rabbits, wash the windows, cancel the taxi,
        collect the laundry, clean the fridge, print the tickets, write to Paul, order a sofa,
        empty the dishwasher, fix the lamp"""
    ),
    messages=listed(
        """the cake is done, I am at the airport, the plane has landed, we need more milk,
        the party is tomorrow, I lost my glasses, the shop is open, my car broke down,
        the baby is awake, it is snowing again, the heating works, we found a hotel"""
    ),
    dishes=listed(
        """lasagna, carrots, steak, noodles, salmon, banana bread, turkey, oatmeal, popcorn,
        spinach, fried rice, ribs"""
    ),
    rooms=listed(
        """pantry, nursery, studio, cellar, balcony, playroom, sewing room, entrance, loft,
        spare room, patio, meeting room"""
    ),
)

DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, today, tomorrow")
ONES = listed("zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
TENS = listed("zero, ten, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")


def in_words(number: int) -> str:
    """Spell out a number below 100, without the ones from 13 to 19: 35 -> "thirty five"."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]} {ONES[ones]}" if ones else TENS[tens]


def clock(rng: Random) -> tuple[str, str]:
    """Return a time from 7:00 am to 9:30 pm, as it is said and as the command holds it."""
    hour, minute = rng.randint(7, 21), rng.choice([0, 15, 30])
    if hour < 12:
        half, part = "am", "in the morning"
    else:
        half, part = "pm", "in the afternoon" if hour < 18 else "in the evening"
    named = (hour - 1) % 12 + 1
    past = {0: "", 15: "quarter past ", 30: "half past "}[minute]
    said = f"at {past}{ONES[named]} {rng.choice([half, part])}"
    return said, f"{named}:{minute:02} {half}"


def moment(rng: Random) -> tuple[str, str]:
    """Return a day and a time, as they are said and as the command holds them."""
    day = rng.choice(DAYS)
    spoken, time = clock(rng)
    said = day if day.startswith("to") else f"on {day}"
    return rng.choice([f"{said} {spoken}", f"{spoken} {said}"]), f"{day} {time}"


def remind(rng: Random, words: Words) -> Request:
    """Ask for a reminder."""
    chore = rng.choice(words.chores)
    said, when = moment(rng)
    request = rng.choice([f"remind me to {chore} {said}", f"remind me {said} to {chore}"])
    return request, {"do": "remind", "what": chore, "when": when}


def book(rng: Random, words: Words) -> Request:
    """Ask for a table in a restaurant."""
    place, people = rng.choice(words.restaurants), rng.randint(2, 12)
    said, when = moment(rng)
    request = rng.choice(
        [
            f"book a table for {in_words(people)} at {place} {said}",
            f"reserve a table at {place} {said} for {in_words(people)}",
        ]
    )
    return request, {"do": "book", "where": place, "people": people, "when": when}


def text(rng: Random, words: Words) -> Request:
    """Ask to have a message sent."""
    name, message = rng.choice(words.people), rng.choice(words.messages)
    request = rng.choice(
        [
            f"tell {name} that {message}",
            f"let {name} know {message}",
            f"send {name} a message saying {message}",
        ]
    )
    return request, {"do": "text", "to": name, "say": message}


def timer(rng: Random, words: Words) -> Request:
    """Ask for a kitchen timer."""
    dish = rng.choice(words.dishes)
    minutes = rng.choice([*range(2, 13), *range(20, 60, 5)])
    request = rng.choice(
        [
            f"set a timer for the {dish} for {in_words(minutes)} minutes",
            f"time the {dish} for {in_words(minutes)} minutes",
            f"start a timer of {in_words(minutes)} minutes for the {dish}",
        ]
    )
    return request, {"do": "timer", "for": f"the {dish}", "minutes": minutes}


def light(rng: Random, words: Words) -> Request:
    """Ask for brighter or darker lights: off is 0, on is 100."""
    room = rng.choice(words.rooms)
    level = rng.choice([0, 100, *range(10, 100, 10)])
    if level in (0, 100):
        switch = "on" if level else "off"
        request = rng.choice(
            [f"turn {switch} the {room} lights", f"switch the lights in the {room} {switch}"]
        )
    else:
        percent = f"{in_words(level)} percent"
        request = rng.choice(
            [f"dim the {room} lights to {percent}", f"set the lights in the {room} to {percent}"]
        )
    return request, {"do": "light", "where": f"the {room}", "level": level}


KINDS: list[Callable[[Random, Words], Request]] = [remind, book, text, timer, light]
MANNERS = [("", "."), ("Please ", "."), ("Could you ", "?"), ("Hey, can you ", "?")]


def make_rows(rng: Random, words: Words, count: int) -> list[dict[str, object]]:
    """Make `count` different chats, with each kind of request equally often."""
    chats: dict[str, Command] = {}
    while len(chats) < count:
        request, command = KINDS[len(chats) % len(KINDS)](rng, words)
        opening, end = rng.choice(MANNERS)
        request = f"{opening}{request}{end}"
        chats[request[0].upper() + request[1:]] = command
    rows: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": json.dumps(command)},
            ]
        }
        for request, command in chats.items()
    ]
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write both files next to this one."""
    rng = Random(SEED)
    for name, words, count in [
        ("train.jsonl", TRAIN_WORDS, TRAIN_ROWS),
        ("test.jsonl", TEST_WORDS, TEST_ROWS),
    ]:
        lines = [json.dumps(row) + "\n" for row in make_rows(rng, words, count)]
        Path(__file__).with_name(name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
