r"""Problems with their solutions, written for these tests, in the style of GSM8K and of MATH."""

GSM8K = [
    ("Ann has 3 boxes of 12 eggs and uses 7. How many are left?", "3*12=<<3*12=36>>36 eggs.", "29"),
    ("A shop sells 1,250 pens a day. How many in 8 days?", "1,250*8=<<1250*8=10000>>.", "10,000"),
    ("Tom had $40 and spent $52.50. What is he left with?", "40-52.5=<<40-52.5=-12.5>>.", "-12.5"),
    ("A pie costs $2.75. What do 3 cost, in dollars?", "2.75*3=<<2.75*3=8.25>>8.25", "8.25"),
    ("It is 4 degrees and falls by 9. How cold is it?", "4-9=<<4-9=-5>>-5 degrees.", "-5"),
    ("Half of 30 birds fly off, then 5 come. How many?", "30/2=15, and 15+5=20 birds.", "20"),
    ("Of 80 seeds 25% grow. How many do?", "80*25/100=<<80*25/100=20>>20 seeds.", "20"),
    ("A train goes 60 mph for 2 1/2 hours. How far?", "60*2.5=<<60*2.5=150>>150 miles.", "150"),
    ("Mia reads 12 pages a day in June. How many?", "June has 30 days.\n12*30=360.", "360"),
    ("A town of 1,204,000 loses 4,000. How many stay?", "1204000-4000=1200000.", "1,200,000"),
    ("Sam is 3 times as old as Al, who is 9. How old?", "3*9=<<3*9=27>>27 years.", "27"),
    ("6 friends share 4 pizzas of 9 slices. Each has?", "4*9=36 slices.\n36/6=6 each.", "6"),
    ("A $120 coat is 30% off. What does it cost?", "120*.30=$<<120*.30=36>>36 off.", "84"),
    ("Two numbers add up to 11; one is 11. The other?", "11-11=<<11-11=0>>0.", "0"),
    ("A tap drips .5 liters an hour. In a day?", ".5*24=<<.5*24=12>>12 liters.", "12"),
    ("Jo earns $15/hour for 7 hours, twice. Altogether?", "15*7=105.\n105*2=$210.", "210"),
    ("A rope of 100 m is cut into 8. How long is each?", "100/8=<<100/8=12.5>>12.5 m.", "12.5"),
    ("Lea walks 3/4 mile to school and back. How far?", "3/4*2=1.5 miles.", "1.5"),
    ("There are 7 days, 24 hours each. How many hours?", "7*24=<<7*24=168>>168.", "168"),
    ("Bo owes $300, pays $125, owes again $25. Owes?", "300-125=175; 175+25=200.", "200"),
    ("A class of 32 has 3 girls to each boy. Girls?", "32/4=8 boys.\n8*3=24 girls.", "24"),
    ("A cube of 5 cm: what is its volume?", "5*5*5=<<5*5*5=125>>125 cubic cm.", "125"),
    ("From 8:30 to 11:00: how many minutes?", "2 hours and 30 minutes: 120+30=150.", "150"),
    ("9 dozen roses lose 1/3. How many roses are left?", "9*12=108.\n108*2/3=72.", "72"),
]
MATH = [
    r"So $x = 2 + 3 = \boxed{5}$.",
    r"Dividing, $\frac{6}{8} = \boxed{\frac{3}{4}}$.",
    r"The slope is $\boxed{-\frac{1}{2}}$ and not $\frac{1}{2}$.",
    r"First $\boxed{7}$, but with both signs it is $\boxed{\pm 7}$.",
    r"The distance is $\sqrt{3^2+3^2} = \boxed{3\sqrt{2}}$.",
    r"Its roots are $\boxed{\frac{-1 + \sqrt{5}}{2}}$.",
    r"The area is $\boxed{9\pi}$ square units.",
    r"The volume is $\boxed{\frac{32}{3}\pi}$.",
    r"The point is $\boxed{(3, -4)}$.",
    r"The point is $\boxed{\left(\frac{1}{2}, 0\right)}$.",
    r"The solutions are $\boxed{1, 2, 3}$.",
    r"The set is $\boxed{\{1, 4, 9\}}$.",
    r"The domain is $\boxed{[0, \infty)}$.",
    r"So $x \in \boxed{(-\infty, -2) \cup (2, \infty)}$.",
    r"It factors as $\boxed{(x - 1)(x + 6)}$.",
    r"It expands to $\boxed{x^3 - 3x^2 + 3x - 1}$.",
    r"The line is $\boxed{y = 2x - 5}$.",
    r"The plane is $\boxed{x + 2y - z + 4 = 0}$.",
    r"The angle is $\boxed{45^\circ}$.",
    r"The chance is $\boxed{\dfrac{5}{36}}$.",
    r"That is $\boxed{12.5\%}$ of them.",
    r"They cost $\boxed{\$4.25}$ together.",
    r"There are $\boxed{10{,}080}$ ways.",
    r"There are $\boxed{2^{10}}$ of them.",
    r"There are $\binom{9}{4} = \boxed{\binom{9}{4}}$ ways.",
    r"In base eight it is $\boxed{1357_8}$.",
    r"The sum is $\boxed{1 + 2i}$.",
    r"The product is $\boxed{e^{i\pi/3}}$.",
    r"It takes $\boxed{15 \text{ minutes}}$.",
    r"It is $\boxed{20\text{ cm}^2}$ large.",
    r"The day is $\boxed{\text{Friday}}$.",
    r"The answer is $\boxed{\text{(C)}}$.",
    r"The function is $\boxed{\text{even}}$.",
    r"The matrix is $\boxed{\begin{pmatrix} 1 & 0 \\ -2 & 3 \end{pmatrix}}$.",
    r"The vector is $\boxed{\begin{pmatrix} 4 \\ -1/2 \end{pmatrix}}$.",
    r"Thus $\cos x = \boxed{-\frac{\sqrt{3}}{2}}$.",
    r"So $a \le \boxed{0.125}$.",
    r"The limit is $\boxed{\ln 2}$.",
    r"The inequality holds for $\boxed{1 < x \le 8}$.",
    r"The value is $\boxed{|a - b|}$.",
    r"It is $\boxed{\sqrt[3]{4}}$ long.",
    r"Hence $n = \boxed 6$.",
    r"We have $\fbox{11}$.",
    r"Thus $f(x) = \boxed{\frac{2x + 1}{x - 3}}$.",
]


def gsm8k_records():
    """As the official files have them."""
    return [{"question": q, "answer": f"{steps}\n#### {final}"} for q, steps, final in GSM8K]


def math_records():
    kinds = ("algebra", "geometry", "precalculus")
    return [
        {
            "problem": f"What is asked in problem {number}?",
            "solution": solution,
            "level": f"Level {1 + number % 5}",
            "type": kinds[number % 3],
        }
        for number, solution in enumerate(MATH)
    ]
