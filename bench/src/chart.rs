//! A line chart with a logarithmic axis, as SVG for light and dark pages. Knows nothing of the
//! figures' meaning.

use lab::measure::{Spread, grouped};

/// A line, with one point per place from the left.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<Spread>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 95.0;
/// The right end of the lines; their names follow.
const END: f64 = 600.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 50.0;
const COLOURS: [&str; 3] = ["#0b84a5", "#d1495b", "#8d6a9f"];

/// Draws the lines over the places, and a horizontal line for the limit.
pub(crate) fn draw(
    title: &str,
    places: &[String],
    limit: (&str, Spread),
    lines: &[Line],
) -> String {
    let figures = || {
        lines
            .iter()
            .flat_map(|line| &line.points)
            .chain([&limit.1])
            .flat_map(|spread| [spread.min, spread.max])
            .filter(|figure| *figure > 0.0)
    };
    let axis = Axis {
        low: figures().fold(f64::INFINITY, f64::min).log10().floor(),
        high: figures().fold(1.0, f64::max).log10().ceil(),
    };
    let step = (END - LEFT) / places.len().saturating_sub(1).max(1) as f64;
    let x = |place: usize| LEFT + step * place as f64;

    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>{title}</title>
<style>
  text {{ fill: #222 }} .grid {{ stroke: #ddd }} .limit {{ stroke: #777 }} .page {{ fill: #fff }}
  @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} .grid {{ stroke: #444 }} .limit {{ stroke: #999 }} .page {{ fill: #161b22 }} }}
</style>
<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>
<text x="{LEFT}" y="32" font-size="16" font-weight="600">{title}</text>
"#
    );
    for tick in axis.ticks() {
        svg += &grid(axis.y(tick), &grouped(tick));
    }
    for (place, name) in places.iter().enumerate() {
        let (x, y) = (x(place), HEIGHT - 20.0);
        svg += &element(&format!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="middle">{name}</text>"#
        ));
    }
    let y = axis.y(limit.1.median);
    svg += &element(&format!(
        r#"<line class="limit" x1="{LEFT}" y1="{y:.1}" x2="{END}" y2="{y:.1}" stroke-width="1.5" stroke-dasharray="6 4"/>"#
    ));
    let mut labels = vec![Label {
        x: END,
        y,
        text: label(limit.0, limit.1),
        colour: None,
    }];
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<_> = (0..).map(x).zip(line.points.iter().copied()).collect();
        svg += &curve(&axis, &points, colour);
        if let Some(&(x, last)) = points.last() {
            let y = axis.y(last.median);
            // If a line ends early, other lines continue to its right: its label goes below.
            let (x, y) = if x < END {
                (x - 42.0, y + 20.0)
            } else {
                (x, y)
            };
            labels.push(Label {
                x,
                y,
                text: label(&line.name, last),
                colour: Some(*colour),
            });
        }
    }
    spread_out(&mut labels);
    svg.extend(labels.iter().map(Label::draw));
    svg + "</svg>\n"
}

/// A horizontal grid line with its label.
fn grid(y: f64, tick: &str) -> String {
    let (text_x, text_y) = (LEFT - 12.0, y + 4.0);
    element(&format!(
        r#"<line class="grid" x1="{LEFT}" y1="{y:.1}" x2="{END}" y2="{y:.1}"/>"#
    )) + &element(&format!(
        r#"<text x="{text_x:.1}" y="{text_y:.1}" text-anchor="end">{tick}</text>"#
    ))
}

/// A line through medians, each a dot on a bar from the lowest round to the highest.
fn curve(axis: &Axis, points: &[(f64, Spread)], colour: &str) -> String {
    let path: Vec<_> = points
        .iter()
        .map(|(x, spread)| format!("{x:.1},{:.1}", axis.y(spread.median)))
        .collect();
    let mut svg = element(&format!(
        r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2.5"/>"#,
        path.join(" ")
    ));
    for (x, spread) in points {
        let [low, middle, high] = [spread.min, spread.median, spread.max].map(|y| axis.y(y));
        svg += &element(&format!(
            r#"<line x1="{x:.1}" y1="{low:.1}" x2="{x:.1}" y2="{high:.1}" stroke="{colour}" stroke-width="6" stroke-opacity=".3"/>"#
        ));
        svg += &element(&format!(
            r#"<circle cx="{x:.1}" cy="{middle:.1}" r="4" fill="{colour}"/>"#
        ));
    }
    svg
}

fn element(text: &str) -> String {
    format!("{text}\n")
}

fn label(name: &str, spread: Spread) -> String {
    format!("{name} {}", grouped(spread.median))
}

/// The label at the right end of a line.
struct Label {
    x: f64,
    y: f64,
    text: String,
    colour: Option<&'static str>,
}

impl Label {
    fn draw(&self) -> String {
        let style = self
            .colour
            .map(|colour| format!(r#" style="fill:{colour}" font-weight="600""#))
            .unwrap_or_default();
        let (x, y) = (self.x + 14.0, self.y + 4.0);
        element(&format!(
            r#"<text x="{x:.1}" y="{y:.1}"{style}>{}</text>"#,
            self.text
        ))
    }
}

/// Moves overlapping labels down.
fn spread_out(labels: &mut [Label]) {
    labels.sort_by(|one, other| one.y.total_cmp(&other.y));
    for below in 1..labels.len() {
        labels[below].y = labels[below].y.max(labels[below - 1].y + 18.0);
    }
}

/// A logarithmic axis between two powers of ten.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn y(&self, figure: f64) -> f64 {
        // Figures that are not positive are drawn at the bottom.
        let power = figure.log10().max(self.low);
        let height = (power - self.low) / (self.high - self.low).max(1.0);
        HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let high = self.high;
        std::iter::successors(Some(self.low), |power| Some(power + 1.0))
            .take_while(move |power| *power <= high)
            .map(|power| 10_f64.powf(power))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(figure: f64) -> Spread {
        Spread::new([figure])
    }

    #[test]
    fn axis_has_a_tick_for_each_power_and_equal_steps_between() {
        let axis = Axis {
            low: 0.0,
            high: 4.0,
        };
        let ticks: Vec<_> = axis.ticks().collect();
        assert_eq!(ticks, [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        let steps: Vec<_> = ticks
            .windows(2)
            .map(|pair| (axis.y(pair[0]) - axis.y(pair[1])).round())
            .collect();
        assert_eq!(steps, [steps[0]; 4]);
        assert!((axis.y(0.0) - axis.y(1.0)).abs() < 1e-9);
    }

    #[test]
    fn chart_names_each_line_and_place() {
        let places = ["empty".to_owned(), "1 million".to_owned()];
        let lines = [Line {
            name: "textbook".to_owned(),
            points: vec![one(2100.0), one(42.0)],
        }];
        let svg = draw("Visits", &places, ("ceiling", one(77_000.0)), &lines);
        for text in [
            "Visits",
            "empty",
            "1 million",
            "textbook 42",
            "ceiling 77 000",
            "100 000",
        ] {
            assert!(svg.contains(&format!(">{text}<")), "{text} is not in {svg}");
        }
    }

    #[test]
    fn labels_do_not_lie_on_each_other() {
        let mut labels = [(100.0, "b"), (95.0, "a"), (300.0, "c")].map(|(y, text)| Label {
            x: 0.0,
            y,
            text: text.to_owned(),
            colour: None,
        });
        spread_out(&mut labels);
        let places = labels.map(|label| format!("{} {}", label.text, label.y));
        assert_eq!(places, ["a 95", "b 113", "c 300"]);
    }
}
