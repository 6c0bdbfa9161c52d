package admin

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"
)

// curve is a line of a chart.
type curve struct {
	class  string // of the style sheet
	name   string
	points []point
}

// point is a value at a time. Between two that are further apart than a gap there is
// no line: nothing is known.
type point struct {
	at time.Time
	y  float64
}

// chart is a picture of values over time.
type chart struct {
	Title string
	Key   string // says which line is which
	SVG   template.HTML
}

// The sizes of a chart, in its own units.
const (
	chartWidth, chartHeight                      = 420, 170
	chartLeft, chartRight, chartTop, chartBottom = 52, 8, 8, 22
	chartInnerWidth                              = chartWidth - chartLeft - chartRight
	chartInnerHeight                             = chartHeight - chartTop - chartBottom
	chartBase                                    = chartHeight - chartBottom
)

// newChart draws curves from a time to another. format writes a value; limit, if not
// 0, is a line across. Nothing in it comes from outside but numbers and times, and
// title, which is escaped.
func newChart(title string, from, to time.Time, gap time.Duration, limit float64, format func(float64) string, curves ...curve) chart {
	top := limit * 1.1
	for _, c := range curves {
		for _, p := range c.points {
			top = max(top, p.y)
		}
	}
	top = roundUp(top)
	x := func(at time.Time) float64 {
		return chartLeft + chartInnerWidth*float64(at.Sub(from))/float64(to.Sub(from))
	}
	y := func(v float64) float64 { return chartTop + chartInnerHeight*(1-v/top) }

	var b strings.Builder
	fmt.Fprintf(&b, `<svg viewBox="0 0 %d %d" role="img" aria-label="%s">`, chartWidth, chartHeight, template.HTMLEscapeString(title+": "+spoken(format, curves)))
	for i := range 3 {
		v := top * float64(i) / 2
		fmt.Fprintf(&b, `<line class="axis" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`,
			chartLeft, chartWidth-chartRight, y(v), y(v), chartLeft-5, y(v)+4, template.HTMLEscapeString(format(v)))
	}
	form := "15:04"
	if to.Sub(from) > 48*time.Hour {
		form = "2 Jan"
	}
	for i, anchor := range []string{"start", "middle", "end"} {
		at := from.Add(to.Sub(from) * time.Duration(i) / 2)
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="%s">%s</text>`, x(at), chartHeight-6, anchor, at.UTC().Format(form))
	}
	if limit > 0 {
		fmt.Fprintf(&b, `<line class="limit" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, chartLeft, chartWidth-chartRight, y(limit), y(limit))
	}
	for _, c := range curves {
		drawCurve(&b, c, gap, x, y)
	}
	b.WriteString(`</svg>`)
	return chart{Title: title, SVG: template.HTML(b.String())} // of our own numbers
}

// drawCurve draws its lines, and a dot where there is no neighbour to draw one to.
func drawCurve(b *strings.Builder, c curve, gap time.Duration, x func(time.Time) float64, y func(float64) float64) {
	for i := 0; i < len(c.points); {
		j := i + 1
		for j < len(c.points) && c.points[j].at.Sub(c.points[j-1].at) <= gap {
			j++
		}
		if j == i+1 {
			fmt.Fprintf(b, `<circle class="dot %s" cx="%.1f" cy="%.1f" r="2"/>`, c.class, x(c.points[i].at), y(c.points[i].y))
		} else {
			fmt.Fprintf(b, `<polyline class="line %s" points="`, c.class)
			for _, p := range c.points[i:j] {
				fmt.Fprintf(b, "%.1f,%.1f ", x(p.at), y(p.y))
			}
			b.WriteString(`"/>`)
		}
		i = j
	}
}

// spoken is what somebody hears who does not see the chart.
func spoken(format func(float64) string, curves []curve) string {
	var parts []string
	for _, c := range curves {
		if len(c.points) == 0 {
			continue
		}
		least, most := math.Inf(1), math.Inf(-1)
		for _, p := range c.points {
			least, most = min(least, p.y), max(most, p.y)
		}
		last := c.points[len(c.points)-1].y
		parts = append(parts, strings.TrimSpace(fmt.Sprintf("%s %s now, between %s and %s", c.name, format(last), format(least), format(most))))
	}
	if len(parts) == 0 {
		return "nothing is known"
	}
	return strings.Join(parts, "; ")
}

// roundUp is the next number of one digit, or 1 for nothing.
func roundUp(v float64) float64 {
	if v <= 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 4, 6, 8} {
		if v <= f*unit {
			return f * unit
		}
	}
	return 10 * unit
}

// short writes a number in a few characters.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%.3g M", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%.3g k", v/1e3)
	case v >= 10 || v == 0:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

// percent writes a fraction.
func percent(v float64) string { return fmt.Sprintf("%.3g %%", 100*v) }
