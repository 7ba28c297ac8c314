"""Two built-in classification tasks: `support_intents` (customer messages) and `clauses` (contract sentences).

A row is put together from a core that decides the label and from parts that say nothing about it: openers, closers, orders, parties, provisos. A
quarter of the cores of each label, of the shop's items and of the parties occurs in validation and test only.
"""

from __future__ import annotations

from atoll.tasks.drawing import Draw, Generator, Row, phrases, sentence, words
from atoll.tasks.vocabulary import CITIES, FIRST_NAMES, SHOP_ITEMS, WEEKDAYS

INTENTS: dict[str, tuple[str, ...]] = {
    "cancel_order": phrases("""
        [please|kindly|] cancel my order for the {item} / I [want|need|would like] to cancel order {order}
        stop order {order}, I no longer want the {item}
        can you call off the {item} I ordered {day}? / I changed my mind about the {item}, don't send it
        don't ship the {item}, I [bought|ordered] it by mistake
        is it too late to cancel the {item}? / take the {item} off, I want to withdraw the whole order
        order {order} should be cancelled before it leaves"""),
    "track_order": phrases("""
        where is my {item}? / can you tell me where order {order} is right now? / I want to track the {item} I ordered {day}
        has order {order} been shipped yet? / what's the status of my {item} order? / the tracking page for {order} shows nothing, where is my parcel?
        any news about the {item} I'm waiting for? / the {item} was due {day} and I still don't know where it is
        how far has parcel {order} come?"""),
    "change_address": phrases("""
        I need to change the delivery address of order {order} / I have moved to {city}, please send the {item} there
        the address on my order for the {item} is wrong
        can you deliver the {item} to my office in {city} instead? / please update my shipping address to {city}
        I typed the wrong street for order {order}
        ship order {order} to a different address / my parcel should go to {city}, not to my old home
        redirect the {item} to my new place in {city}"""),
    "get_refund": phrases("""
        I [want|would like] my money back for the {item} / when will I get the refund for order {order}? / please refund the {item} I sent back {day}
        I returned the {item} but no money has arrived / how do I get a refund for the {item}?
        the refund of {price} dollars for {order} is still missing
        give me back the {price} dollars I paid for the {item} / you promised to repay me for order {order}
        I was told {day} that I'd be reimbursed for the {item}"""),
    "return_item": phrases("""
        how can I send the {item} back? / I need a return label for the {item} / what is the way to return order {order}?
        can I return a {item} that I have already opened? / the {item} is not for me, how do I ship it back? / until when may I return the {item}?
        I'd like to start a return for order {order} / do I have to pay the postage if I send back the {item}?
        where do I drop off the {item} for a return?"""),
    "exchange_item": phrases("""
        can I swap the {item} for another colour? / I [want|would like] to exchange the {item} for a bigger one
        please change the {item} for a smaller size
        I'd rather have the {item} in {colour}, can we swap? / may I trade the {item} in order {order} for another model?
        is it possible to exchange my {colour} {item} for a {colour2} one?
        the {item} is too small, could I get a larger one in exchange? / I need the {item} in a different size, please exchange it
        switch the {colour} {item} for {colour2} please"""),
    "damaged_item": phrases("""
        the {item} arrived broken / my {item} came with a crack / the box was crushed and the {item} is dented
        I unpacked the {item} and it is in pieces / the {item} has a big scratch on the front / the {item} from order {order} is damaged
        the {item} was torn when it got here {day} / the {item} leaks and one side is smashed / my new {item} is chipped at the corner"""),
    "wrong_item": phrases("""
        I ordered a {item} but got a {item2} / you sent me a {item2} instead of the {item} / this is not the {item} I ordered
        order {order} had a {item2} in it, I never asked for that / I received somebody else's {item2}
        the parcel contained a {item2}, but I bought a {item}
        there must be a mix-up: I have a {item2} here and no {item} / why is there a {item2} in my box? I paid for a {item}
        wrong product in order {order}, a {item2}"""),
    "payment_failed": phrases("""
        my card was declined when I tried to buy the {item} / the payment for order {order} does not go through
        I can't pay, the checkout shows an error
        why was my payment for the {item} refused? / paying with my [bank card|credit card] fails every time
        the payment page hangs when I try to pay {price} dollars
        I tried {day} to pay for the {item} but the transaction failed / your site rejects my card for the {item}
        it says payment unsuccessful for {order}"""),
    "charged_twice": phrases("""
        I was charged twice for the {item} / you took {price} dollars two times for order {order}
        there are two payments for the {item} on my statement
        my bank shows a double charge of {price} dollars / order {order} was billed twice / why did you take the money for the {item} a second time?
        the same {price} dollars left my account twice {day} / please undo the duplicate charge for the {item}
        I paid once but see two debits for {order}"""),
    "reset_password": phrases("""
        I forgot my password / how do I reset my password? / I can't log in, my password doesn't work any more
        the reset link for my password never came / please send me a new password / my account is locked after too many wrong passwords
        I want to choose another password for my account / the password email does not arrive at my [work|home|new] address
        log-in fails although I changed my password {day}"""),
    "delete_account": phrases("""
        please delete my account / I want to close my account for good / remove my profile and all of my data
        how can I erase my account with you? / I don't want to be a customer any longer, delete everything about me / take my account off your system
        I'd like to have my customer account removed {day} / close my account, I have moved to {city} / wipe my personal data and the account"""),
    "use_discount": phrases("""
        my discount code does not work for the {item} / how do I use a coupon for the {item}? / the voucher of {price} dollars was not taken off
        I have a gift code, where do I enter it? / the promo code says expired although it is new / can I combine two coupons on a {item}?
        I forgot to enter my voucher for order {order} / the ten percent code is refused at checkout for the {item}
        is there a discount code for a {item}?"""),
    "check_stock": phrases("""
        do you have the {item} in {colour}? / when will the {item} be back in stock? / is the {colour} {item} available in {city}?
        how many pieces of the {item} do you have left? / the {item} is sold out, will you get more?
        is there any {colour} {item} left in the warehouse?
        can I still get a {item} in {colour}? / do you sell a {item} like the one from last year?
        will there be more of the {colour} {item} by {day}?"""),
    "shipping_cost": phrases("""
        how much is shipping to {city}? / what do you charge for sending a {item} to {city}? / is delivery free if I spend {price} dollars?
        what does express delivery of a {item} cost? / do I pay postage for an order over {price} dollars? / how expensive is delivery to {city}?
        what are the delivery fees for a {item}? / is shipping a {item} to {city} included in the price?
        tell me the price of sending a parcel to {city}"""),
    "get_invoice": phrases("""
        I need an invoice for order {order} / please send me the receipt for the {item} / where can I download the bill for order {order}?
        the invoice for the {item} is missing my company's name / can I get a copy of the receipt from {day}?
        my accountant needs a bill for {price} dollars for the {item}
        there was no invoice in the box with the {item} / email me the tax invoice of {order}
        could you issue a receipt for the {price} dollars I paid?"""),
    "talk_to_human": phrases("""
        I want to speak to a real person / can somebody call me about order {order}? / please connect me with an agent
        is there a phone number where I can talk to someone? / stop the robot answers and give me a human / let me chat with an employee
        put me through to your manager / I need a person on the line about the {item}, not a bot / could a colleague ring me back {day}?"""),
    "file_complaint": phrases("""
        I want to complain about your service / your driver in {city} was very rude to me / I'm filing a complaint about how I was treated
        this is the worst shop I have dealt with, who do I write a complaint to? / the way your staff answered me {day} was unacceptable
        I wish to make an official complaint
        your courier threw the {item} over the fence, I'm angry / I have a complaint about the shop in {city}
        nobody has been polite to me and I want that on record"""),
}  # fmt: skip

OPENERS = phrases("""
    hi, / hello, / good morning, / hi there, / hey, / dear team, / hello again, / good evening, / sorry to bother you, / quick question:
    hi, {name} here, / excuse me,""")
CLOSERS = phrases("""
    thanks / thank you / thanks, {name} / please help / many thanks in advance / best, {name} / it's urgent / please answer soon
    I have an account with you since {year}
    regards, {name} / I wrote to you {day} already / cheers""")
COLOURS = words("black, white, blue, grey, red, green, brown, yellow, orange, purple, pink, silver")
ORDER_DAYS = (*(f"on {day}" for day in WEEKDAYS), "yesterday", "last week", "today")


def _with_typo(draw: Draw, text: str) -> str:
    """`text` with two neighbouring letters swapped, or one left out, inside one longer word."""
    pieces = text.split(" ")
    long = [index for index, piece in enumerate(pieces) if len(piece) > 5 and piece.isalpha()]
    if not long:
        return text
    index = draw.any(long)
    word, at = pieces[index], draw.integer(1, len(pieces[index]) - 3)
    pieces[index] = word[:at] + (word[at + 1] + word[at] + word[at + 2 :] if draw.chance(0.5) else word[at + 1 :])
    return " ".join(pieces)


def support_row(draw: Draw, intent: str) -> Row:
    """One customer message of an intent."""
    slots = {
        "item": SHOP_ITEMS, "city": CITIES, "day": ORDER_DAYS, "colour": COLOURS, "name": FIRST_NAMES, "price": str(draw.integer(8, 240)),
        "order": f"{draw.any('ABKLRT')}{draw.integer(1000, 9999)}", "year": str(draw.integer(2012, 2024)),
    }  # fmt: skip
    text = draw.say(draw.pick(INTENTS[intent]), slots)
    if draw.chance(0.45):
        text = f"{draw.say(draw.pick(OPENERS), slots)} {text}"
    if draw.chance(0.4):
        end = "" if text.endswith("?") else draw.any((".", ",", "!"))
        closer = draw.say(draw.pick(CLOSERS), slots)
        text = f"{text}{end} {closer if end == ',' else sentence(closer)}"
    if draw.chance(0.2):
        text = _with_typo(draw, text)
    style = draw.integer(0, 9)
    if style < 3:
        text = text.lower()
    elif style < 9:
        text = sentence(text)
        text += "" if text[-1] in ".?!" else "."
    return {"message": text, "intent": intent}


CLAUSES: dict[str, tuple[str, ...]] = {
    "termination": phrases("""
        [either party|{one}|{two}] may end this Agreement by giving {n} days' written notice
        this Agreement may be terminated by {one} at any time without cause
        if {two} fails to cure a breach within {n} days, {one} may terminate this Agreement
        this Agreement ends at once when either party becomes insolvent
        {one} has the right to cancel this Agreement if {two} stops trading
        on expiry of {n} days from a material default this Agreement ceases to have effect
        termination of this Agreement by {two} takes effect {n} days after it is declared
        a change of ownership of {two} entitles {one} to end this Agreement"""),
    "confidentiality": phrases("""
        {two} shall keep secret all information that {one} discloses to it / neither party may reveal the other's trade secrets to a third party
        each party shall protect confidential information with reasonable care for {n} years
        {two} shall use confidential material only to perform this Agreement
        {one} and {two} shall not disclose the terms of this Agreement / documents marked confidential must be given back or destroyed within {n} days
        no employee of {two} may pass on non-public data received from {one}
        the duty of secrecy does not cover information that is already public"""),
    "governing_law": phrases("""
        this Agreement is governed by the laws of {place} / the courts of {place} have exclusive jurisdiction over any dispute
        any dispute between {one} and {two} shall be settled by arbitration in {place}
        the laws of {place} apply, without regard to conflict of law rules
        {one} and {two} submit to the jurisdiction of the courts of {place}
        this Agreement shall be construed in accordance with the law in force in {place}
        legal proceedings must be brought before the competent court in {place}
        the validity of this Agreement is determined by the law of {place}"""),
    "payment": phrases("""
        {two} shall pay each invoice within {n} days of receipt / {two} shall pay {one} a fee of {amount} dollars a month
        late payments bear interest of {small} percent a year
        all fees are due in advance on the first day of each quarter / {one} may invoice {amount} dollars upon delivery
        the price is {amount} dollars, exclusive of taxes
        sums not paid within {n} days carry interest at {small} percent / {two} shall transfer {amount} dollars to the account that {one} names"""),
    "liability": phrases("""
        the total liability of {one} shall not exceed {amount} dollars / neither party is liable for indirect or consequential damages
        in no event shall {one} be liable to {two} for lost profits / the liability of {one} is limited to the fees paid in the last {small} months
        {one} accepts no liability for loss of data or revenue / any claim for damages against {one} is capped at {amount} dollars
        {one} shall not be answerable for damage beyond {amount} dollars in any year / except for fraud, liability of either party is excluded"""),
    "indemnity": phrases("""
        {two} shall indemnify {one} against all claims of third parties / {one} agrees to defend and hold {two} harmless from any suit
        {two} shall reimburse {one} for losses that arise from its negligence / each party shall indemnify the other for claims caused by its staff
        {one} holds {two} harmless against costs, including legal fees, of any infringement claim
        {two} bears all losses that {one} suffers from third-party actions
        {two} shall compensate and hold harmless {one} for claims up to {amount} dollars
        the indemnifying party takes over the defence of any such claim"""),
    "assignment": phrases("""
        {two} may not assign this Agreement without the written consent of {one}
        neither party may transfer its rights under this Agreement to another
        {one} may assign this Agreement to an affiliate / any attempt by {two} to assign its obligations is void
        this Agreement binds the successors and permitted assigns of {one} and {two}
        {two} shall not delegate or subcontract its duties without approval
        rights under this Agreement may be made over to a buyer of the whole business of {one}
        a transfer of this Agreement by {two} needs {n} days' prior approval"""),
    "force_majeure": phrases("""
        neither party is responsible for delay caused by events beyond its control / {one} is excused from performance during fire, flood or war
        if a natural disaster prevents delivery, the time for performance is extended
        strikes, epidemics and acts of government release {two} from its duties while they last
        {one} is not in default when an earthquake or storm makes performance impossible
        a party hit by force majeure shall inform the other within {n} days
        failure to perform due to power cuts or embargoes is no breach
        should unforeseeable events last more than {n} days, duties of {two} are suspended"""),
    "notices": phrases("""
        all notices under this Agreement must be in writing and sent by registered mail / notices to {one} shall be sent to its office in {place}
        a notice is deemed received {small} days after posting / {two} shall send every notice by email and by courier
        each party shall tell the other of a new address for notices within {n} days / notice by email is effective on the next business day
        any communication to {two} is to be addressed to its office in {place} / letters to {one} count as delivered when signed for"""),
    "ip_ownership": phrases("""
        {one} owns all intellectual property in the work product / {two} assigns to {one} all copyrights in the deliverables
        nothing in this Agreement transfers any patent or trademark to {two} / inventions made by {two} in the course of the services belong to {one}
        {one} keeps all right, title and interest in its software / copyright in the documents that {two} prepares vests in {one}
        all designs created under this Agreement are the property of {one} / {two} gains no ownership of the trademarks and source code of {one}"""),
    "warranty": phrases("""
        {one} warrants that the goods are free from defects for {small} months
        {one} warrants that the services will be performed with skill and care
        the goods are provided as is, without warranty of any kind / {two} represents that it has full power to enter into this Agreement
        {one} guarantees that the product meets the specification for {n} days / {one} disclaims all implied warranties of fitness for a purpose
        {one} will repair or replace goods found defective within {small} months
        each party represents and warrants that it complies with applicable law"""),
    "insurance": phrases("""
        {two} shall maintain liability insurance of at least {amount} dollars / {one} shall carry workers' compensation coverage during the term
        {two} must give {one} a certificate of insurance within {n} days / the policy shall name {one} as an additional insured
        {two} shall insure the goods in transit for {amount} dollars / the insurer must notify {one} {n} days before coverage is cancelled
        {two} shall take out a policy that covers fire and theft at its premises
        cover of no less than {amount} dollars per event is to be kept in force"""),
}  # fmt: skip

PARTIES = tuple(
    tuple(pair.split("/"))
    for pair in words("""
        the Supplier/the Customer, the Licensor/the Licensee, the Contractor/the Client, the Landlord/the Tenant, the Seller/the Buyer,
        the Company/the Consultant,
        the Provider/the User, the Franchisor/the Franchisee, the Publisher/the Author, the Manufacturer/the Distributor, the Owner/the Operator,
        the Carrier/the Shipper""")
)  # fmt: skip
PLACES = words("""
    Scotland, Ontario, New York, France, Kenya, California, Ireland, Brazil, Singapore, Texas, Norway, Delaware, Portugal, Ghana, Denmark,
    Illinois, Spain,
    Queensland, Austria, Quebec, Chile, Florida, Estonia, Peru""")
CLAUSE_STARTS = phrases("""
    The parties agree that / Unless otherwise agreed in writing, / For the avoidance of doubt, / Except as provided in Section {small},
    Subject to Section {small},
    As of the Effective Date, / Notwithstanding Section {small}, / It is understood that / During the term of this Agreement,
    Under this Section {small},""")
CLAUSE_ENDS = phrases("""
    unless the parties agree otherwise in writing / as set out in Schedule {small} / subject to applicable law / to the extent permitted by law
    and this Section {small} survives the end of the Agreement / as described in Annex {small} / in each case without prejudice to other rights
    for the purposes of this Agreement""")


def clause_row(draw: Draw, label: str) -> Row:
    """One sentence of a contract."""
    one, two = draw.pick(PARTIES)
    if draw.chance(0.2):
        one, two = two, one
    slots = {
        "one": one, "two": two, "place": PLACES, "n": draw.any(("5", "7", "10", "14", "15", "20", "21", "30", "45", "60", "90", "120")),
        "amount": f"{draw.integer(1, 90)},{draw.any(('000', '500'))}", "small": str(draw.integer(2, 24)),
    }  # fmt: skip
    text = draw.say(draw.pick(CLAUSES[label]), slots)
    if draw.chance(0.5):
        text = f"{draw.say(draw.pick(CLAUSE_STARTS), slots)} {text}"
    if draw.chance(0.45):
        text = f"{text}, {draw.say(draw.pick(CLAUSE_ENDS), slots)}"
    number = f"{draw.integer(1, 24)}.{draw.integer(1, 9)} " if draw.chance(0.3) else ""
    return {"clause": f"{number}{sentence(text)}.", "label": label}


def generators() -> tuple[Generator, ...]:
    """`support_intents` and `clauses`."""
    support = {
        "name": "support_intents",
        "title": "Intents of customers' messages to an online shop",
        "family": "classification",
        "fields": {"message": "a customer's message (input)", "intent": f"the intent, one of {len(INTENTS)} (target)"},
        "input_fields": ["message"],
        "target": "intent",
        "label_set": list(INTENTS),
        "metric": "accuracy",
        "instruction": "Name the intent of the customer's message.",
        "template": "Message: {message}\nIntent:",
        "notes": "A quarter of the phrasings of each intent occurs in validation and test only. One message in five has a typing error.",
    }
    clauses = {
        "name": "clauses",
        "title": "Types of contract clauses",
        "family": "classification",
        "fields": {"clause": "a sentence of a contract (input)", "label": f"its type, one of {len(CLAUSES)} (target)"},
        "input_fields": ["clause"],
        "target": "label",
        "label_set": list(CLAUSES),
        "metric": "accuracy",
        "instruction": "Name the type of the contract clause.",
        "template": "Clause: {clause}\nType:",
        "notes": "A quarter of the wordings of each type occurs in validation and test only.",
    }
    return Generator(support, tuple(INTENTS), support_row, ("message",)), Generator(clauses, tuple(CLAUSES), clause_row, ("clause",))
