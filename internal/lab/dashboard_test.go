package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// promtool is where `make promtool` puts it, if it is not installed.
func promtool(t *testing.T) string {
	t.Helper()
	program, err := exec.LookPath("promtool")
	if err == nil {
		return program
	}
	if program, err = filepath.Abs("../../bin/promtool"); err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		t.Fatalf("%v (make promtool fetches it)", err)
	}
	return program
}

// metricsOf is what a node shows to operators.
func metricsOf(ctx context.Context, l *Lab, n *Node) (string, error) {
	hc, err := l.httpClient(l.profileDir("operator", "root"))
	if err != nil {
		return "", err
	}
	defer hc.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.OperatorURL()+"/metrics", nil)
	if err != nil {
		return "", err
	}
	res, err := hc.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("answered %d", res.StatusCode)
	}
	return string(text), err
}

// expressions are those of the dashboard, by the title of their panel.
func expressions(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../deploy/dashboards/kme.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	found := make(map[string][]string)
	for _, p := range d.Panels {
		for _, x := range p.Targets {
			found[p.Title] = append(found[p.Title], strings.ReplaceAll(x.Expr, "$site", ".*"))
		}
	}
	return found
}

// sample is a line of metrics: name, labels and value.
var sample = regexp.MustCompile(`^([a-z_]+)(?:\{(.*)\})? ([-+0-9.eE]+|NaN)( |$)`)

// dashboard: each expression of the dashboard parses, and finds something in what a
// node of the lab says after some traffic.
func dashboard(t *testing.T, l *Lab) {
	n := l.KM1.Nodes[0]
	var text string
	eventually(t, "a block, and a request, in the metrics", func(ctx context.Context) (err error) {
		if text, err = metricsOf(ctx, l, n); err != nil {
			return err
		}
		for _, want := range []string{"kme_link_last_block_timestamp_seconds", `action="enc_keys"`, "kme_peer_clock_offset_seconds"} {
			if !strings.Contains(text, want) {
				return errors.New(want)
			}
		}
		return nil
	})
	type series struct {
		Series string `yaml:"series"`
		Values string `yaml:"values"`
	}
	type value struct {
		Labels string  `yaml:"labels"`
		Value  float64 `yaml:"value"`
	}
	type query struct {
		Expr     string  `yaml:"expr"`
		EvalTime string  `yaml:"eval_time"`
		Samples  []value `yaml:"exp_samples"`
	}
	type test struct {
		Interval string   `yaml:"interval"`
		Series   []series `yaml:"input_series"`
		Queries  []query  `yaml:"promql_expr_test"`
	}
	one := test{Interval: "1m"}
	text += "\nkme_link_qber{link=\"km1-km2\"} 0.01\n" // as light has it, which no filler has
	for _, line := range strings.Split(text, "\n") {
		m := sample.FindStringSubmatch(line)
		if m == nil || m[3] == "NaN" {
			continue
		}
		labels := strings.TrimPrefix(m[2]+`,job="kme",site="km1",instance="km1-a"`, ",")
		one.Series = append(one.Series, series{m[1] + "{" + labels + "}", m[3] + "x2"})
	}
	for title, list := range expressions(t) {
		for _, x := range list {
			if title == "Empty in" {
				x = "(" + x + ") or vector(0)" // there only while a pool shrinks: it need but parse
			}
			one.Queries = append(one.Queries, query{"count(" + x + ") > bool 0", "2m", []value{{"{}", 1}}})
		}
	}
	if len(one.Queries) < 20 || len(one.Series) < 50 {
		t.Errorf("%d expressions, %d series", len(one.Queries), len(one.Series))
	}
	file := filepath.Join(t.TempDir(), "test.yml")
	out, err := yaml.Marshal(map[string]any{"tests": []test{one}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), promtool(t), "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
