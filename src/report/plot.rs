//! Plots as inline SVG: text in, text out. Colours are classes `s0`, `s1`, …, one per model, that the page's style defines,
//! so that light and dark pages share one drawing.

use std::fmt::Write;

use crate::eval::Estimate;

/// Width of every drawing in its own units; pages scale it.
const WIDTH: f64 = 520.0;
/// Models that get a colour of their own; the next one starts over.
pub const COLOURS: usize = 8;

/// A model in the plane of size and divergence.
pub struct Point {
    /// The model's name.
    pub label: String,
    /// Stored bytes.
    pub x: f64,
    /// Divergence, with its interval.
    pub y: Estimate,
    /// What is shown when pointed at.
    pub title: String,
    /// Index of its colour.
    pub series: usize,
}

/// A bar of a group.
pub struct Bar {
    /// Length, with its interval.
    pub value: Estimate,
    /// The value as people read it.
    pub shown: String,
    /// Index of its colour.
    pub series: usize,
    /// What is shown when pointed at.
    pub title: String,
}

/// Bars that belong together.
pub struct Group {
    /// What they have in common.
    pub label: String,
    /// One per model.
    pub bars: Vec<Bar>,
}

/// A value axis.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// Covers positive values; logarithmic where they span more than a factor of 20.
    fn covering(values: impl Iterator<Item = f64> + Clone) -> Self {
        let high = values.clone().fold(0.0, f64::max);
        let low = values.filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
        match low.is_finite() && high / low > 20.0 {
            true => Axis { low: low / 1.5, high: high * 1.5, log: true },
            false => Axis { low: 0.0, high: if high > 0.0 { high * 1.1 } else { 1.0 }, log: false },
        }
    }

    /// Returns where a value lies, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        share.clamp(0.0, 1.0)
    }

    /// Returns round values along the axis.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let steps = [1.0, 2.0, 5.0];
            let wide = self.high / self.low > 1000.0;
            let powers = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let ticks = powers.flat_map(|power| {
                steps[..if wide { 1 } else { 3 }].iter().map(move |s| s * 10f64.powi(power))
            });
            return ticks.filter(|tick| (self.low..=self.high).contains(tick)).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        (0..).map(|i| i as f64 * step).take_while(|tick| *tick <= self.high).collect()
    }
}

/// Draws size against divergence; `x_shown` and `y_shown` write tick labels.
pub fn scatter(points: &[Point], x_shown: fn(f64) -> String, y_shown: fn(f64) -> String) -> String {
    const HEIGHT: f64 = 340.0;
    let (left, right, top, bottom) = (62.0, WIDTH - 14.0, 12.0, HEIGHT - 34.0);
    let x_axis = Axis::covering(points.iter().map(|point| point.x));
    let ends = points.iter().flat_map(|p| {
        [
            p.y.value,
            p.y.interval.map_or(p.y.value, |i| i[0].max(p.y.value / 10.0)),
            p.y.interval.map_or(p.y.value, |i| i[1]),
        ]
    });
    let y_axis = Axis::covering(ends);
    let x_at = |x: f64| left + x_axis.share(x) * (right - left);
    let y_at = |y: f64| bottom - y_axis.share(y) * (bottom - top);
    let mut svg = open(HEIGHT, "size against KL divergence");
    for tick in y_axis.ticks() {
        let y = y_at(tick);
        _ = write!(svg, r#"<path class="grid" d="M{left:.1} {y:.1}H{right:.1}"/>"#);
        svg += &text(left - 6.0, y + 4.0, "end", "tick", &y_shown(tick));
    }
    for tick in x_axis.ticks() {
        svg += &text(x_at(tick), bottom + 16.0, "middle", "tick", &x_shown(tick));
    }
    _ = write!(svg, r#"<path class="axis" d="M{left:.1} {top:.1}V{bottom:.1}H{right:.1}"/>"#);
    svg += &text(right, HEIGHT - 4.0, "end", "tick", "size");
    let labels = spread(points.iter().map(|point| y_at(point.y.value) + 4.0).collect(), 15.0, bottom);
    for (point, label) in points.iter().zip(labels) {
        let (x, y, class) = (x_at(point.x), y_at(point.y.value), point.series % COLOURS);
        if let Some([low, high]) = point.y.interval {
            _ = write!(
                svg,
                r#"<path class="whisker s{class}" d="M{x:.1} {:.1}V{:.1}"/>"#,
                y_at(low),
                y_at(high)
            );
        }
        let title = escape(&point.title);
        _ = write!(
            svg,
            r#"<circle class="s{class}" cx="{x:.1}" cy="{y:.1}" r="5"><title>{title}</title></circle>"#
        );
        let (anchor, at) = if x > (left + right) / 2.0 { ("end", x - 9.0) } else { ("start", x + 9.0) };
        svg += &text(at, label, anchor, "label", &point.label);
    }
    svg + "</svg>"
}

/// Draws groups of horizontal bars with whiskers.
pub fn bars(groups: &[Group], what: &str) -> String {
    const BAR: f64 = 15.0;
    let (left, right) = (128.0, WIDTH - 84.0);
    let ends = groups
        .iter()
        .flat_map(|group| &group.bars)
        .map(|bar| bar.value.interval.map_or(bar.value.value, |i| i[1].max(bar.value.value)));
    let longest = ends.fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let width = |value: f64| (value / longest).clamp(0.0, 1.0) * (right - left);
    let height = groups.iter().map(|group| group.bars.len() as f64 * BAR + 10.0).sum::<f64>() + 4.0;
    let mut svg = open(height, what);
    let mut y = 4.0;
    for group in groups {
        svg += &text(
            left - 8.0,
            y + group.bars.len() as f64 * BAR / 2.0 + 4.0,
            "end",
            "label",
            &shortened(&group.label, 18),
        );
        for bar in &group.bars {
            let (length, class, title) = (width(bar.value.value), bar.series % COLOURS, escape(&bar.title));
            let height = BAR - 3.0;
            _ = write!(
                svg,
                r#"<rect class="s{class}" x="{left}" y="{y:.1}" width="{length:.1}" height="{height}"><title>{title}</title></rect>"#
            );
            let mut end = left + length;
            if let Some([low, high]) = bar.value.interval {
                let (from, to, middle) = (left + width(low), left + width(high), y + height / 2.0);
                _ = write!(svg, r#"<path class="axis" d="M{from:.1} {middle:.1}H{to:.1}"/>"#);
                end = end.max(to);
            }
            svg += &text(end + 5.0, y + height - 1.0, "start", "tick", &bar.shown);
            y += BAR;
        }
        y += 10.0;
    }
    svg + "</svg>"
}

/// A cell of a [`heat`] map.
pub struct Cell {
    /// Row, counted from 0.
    pub row: usize,
    /// Column, counted from 0.
    pub column: usize,
    /// How dark it is.
    pub value: f64,
    /// What is shown when pointed at.
    pub title: String,
}

/// Draws a map with a cell for each row and column; the square root of the value decides the shade.
pub fn heat(rows: &[String], columns: &[String], cells: &[Cell], what: &str) -> String {
    const CELL: f64 = 22.0;
    let left = 80.0;
    let width = ((WIDTH - left - 4.0) / columns.len().max(1) as f64).min(60.0);
    let mut svg = open(rows.len() as f64 * CELL + 22.0, what);
    for (at, row) in rows.iter().enumerate() {
        svg += &text(left - 8.0, at as f64 * CELL + 15.0, "end", "label", row);
    }
    let every = (28.0 / width).ceil() as usize;
    for (at, column) in columns.iter().enumerate().step_by(every.max(1)) {
        svg += &text(
            left + (at as f64 + 0.5) * width,
            rows.len() as f64 * CELL + 16.0,
            "middle",
            "tick",
            column,
        );
    }
    let largest = cells.iter().map(|cell| cell.value).fold(f64::MIN_POSITIVE, f64::max);
    for Cell { row, column, value, title } in cells {
        let shade = (value.max(0.0) / largest).sqrt();
        let (x, y) = (left + *column as f64 * width, *row as f64 * CELL);
        _ = write!(
            svg,
            r#"<rect class="s1" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{}" fill-opacity="{shade:.3}"><title>{}</title></rect>"#,
            (width - 1.0).max(0.5),
            CELL - 1.0,
            escape(title)
        );
    }
    svg + "</svg>"
}

fn open(height: f64, what: &str) -> String {
    format!(r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{}">"#, escape(what))
}

fn text(x: f64, y: f64, anchor: &str, class: &str, text: &str) -> String {
    format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text))
}

/// Moves positions apart until neighbours keep a distance, and none lies below `bottom`.
fn spread(positions: Vec<f64>, distance: f64, bottom: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..positions.len()).collect();
    order.sort_by(|&a, &b| positions[b].total_cmp(&positions[a]));
    let mut spread = positions;
    let mut limit = bottom;
    for at in order {
        spread[at] = spread[at].min(limit);
        limit = spread[at] - distance;
    }
    spread
}

fn shortened(label: &str, most: usize) -> String {
    if label.chars().count() <= most {
        return label.to_string();
    }
    label.chars().take(most - 1).chain(['…']).collect()
}

/// Replaces what XML gives a meaning.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(value: f64) -> Estimate {
        Estimate { value, interval: Some([value * 0.9, value * 1.1]) }
    }

    #[test]
    fn drawings_are_well_formed_whatever_names_contain() {
        let name = "a<b>&\"c\"";
        let point = Point { label: name.into(), x: 1e6, y: estimate(0.1), title: name.into(), series: 9 };
        let bar = Bar { value: estimate(2.0), shown: name.into(), series: 0, title: name.into() };
        let cell = Cell { row: 0, column: 0, value: 0.0, title: name.into() };
        for svg in [
            scatter(&[point], |x| x.to_string(), |y| y.to_string()),
            bars(&[Group { label: name.into(), bars: vec![bar] }], name),
            heat(&[name.into()], &[name.into()], &[cell], name),
            scatter(&[], |x| x.to_string(), |y| y.to_string()),
        ] {
            assert!(!svg.contains("a<b") && svg.ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
            assert_eq!(svg.matches("<title>").count(), svg.matches("</title>").count());
        }
    }

    #[test]
    fn axes_are_logarithmic_only_where_values_span_much() {
        let axis = |values: &[f64]| Axis::covering(values.iter().copied());
        assert!(axis(&[0.001, 0.1]).log && !axis(&[0.05, 0.1]).log && !axis(&[0.0, 0.0]).log);
        assert_eq!(axis(&[0.0, 0.45]).ticks(), [0.0, 0.1, 0.2, 0.30000000000000004, 0.4]);
        let log = axis(&[0.001, 0.1]);
        assert!(log.ticks().contains(&0.01) && log.share(0.01) > 0.4 && log.share(0.01) < 0.6);
    }

    #[test]
    fn labels_keep_their_distance() {
        assert_eq!(spread(vec![10.0, 12.0, 50.0], 13.0, 45.0), [-1.0, 12.0, 45.0]);
    }
}
