package siem

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	strict "github.com/go-json-experiment/json"
	syslog "github.com/leodido/go-syslog/v4"
	"github.com/leodido/go-syslog/v4/octetcounting"
	"github.com/leodido/go-syslog/v4/rfc5424"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/audit"
)

// What is sent is held here against the grammars of the formats by parsers that others
// have written.

// nasty is text such as a caller may have made an event say.
var nasty = rapid.OneOf(
	rapid.String(),
	rapid.StringOf(rapid.RuneFrom([]rune("\"\\][=<> \n\r\t\x00\x1b\x7f\u0085é\u2028\ufeff\uffff😀a1"))),
	rapid.SampledFrom([]string{
		`"] [kme@32473 leaf="9"] `, `\`, `\\"`, `]`, "\n<13>1 - - - - - -", "}\n{", "10 <13>1", "</script>", "\xff",
		strings.Repeat("long é ", 200),
	}),
)

// longest makes a text longer than a string of OCSF may be, now and then.
var longest = rapid.Custom(func(t *rapid.T) string {
	if rapid.IntRange(0, 9).Draw(t, "long") == 0 {
		return strings.Repeat(`"]\`, 14_000)
	}
	return nasty.Draw(t, "text")
})

// anyEvent is an event with whatever a caller may have made it say, as it is read from
// the log.
func anyEvent(t *rapid.T) audit.Event {
	e := audit.Event{
		Site: "km1", Node: nasty.Draw(t, "node"), Run: 1, Seq: 7, At: time.UnixMilli(rapid.Int64Range(0, 1<<41).Draw(t, "at")),
		Action:  rapid.SampledFrom([]audit.Action{audit.EncKeys, audit.Alarm, audit.Start, audit.Malformed}).Draw(t, "action"),
		Outcome: rapid.SampledFrom([]audit.Outcome{audit.Done, audit.Refused, audit.Failed}).Draw(t, "outcome"),
		Reason:  longest.Draw(t, "reason"), Request: rapid.SampledFrom([]string{"", "0193"}).Draw(t, "request"),
		Actor: audit.Actor{
			Role: rapid.SampledFrom([]string{"", "sae", "operator"}).Draw(t, "role"), ID: nasty.Draw(t, "actor"),
			Serial: rapid.SampledFrom([]string{"", "1234567890"}).Draw(t, "serial"),
			Remote: rapid.SampledFrom([]string{"", "127.0.0.1:4000", "[::1]:99", "[fe80::1%eth0]:5", "[::ffff:10.0.0.1]:1", "odd", "1.2.3.4:99999"}).Draw(t, "remote"),
		},
		Peer: longest.Draw(t, "peer"), Master: nasty.Draw(t, "master"),
	}
	e, err := audit.ParseEvent(e.AppendText(nil))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// parseSyslog reads a message of RFC 5424; best effort is not enough.
func parseSyslog(t testing.TB, message []byte) *rfc5424.SyslogMessage {
	t.Helper()
	m, err := rfc5424.NewMachine().Parse(message)
	if err != nil {
		t.Fatalf("%.300q is no message of RFC 5424: %v", message, err)
	}
	return m.(*rfc5424.SyslogMessage)
}

// leafOf is the number that a message gives as its identity.
func leafOf(t testing.TB, m *rfc5424.SyslogMessage) int64 {
	t.Helper()
	leaf, err := strconv.ParseInt((*m.StructuredData)["kme@32473"]["leaf"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// checkSyslog holds what a parser has read of a message against the record.
func checkSyslog(t *rapid.T, m *rfc5424.SyslogMessage, r Record) {
	e := r.Event
	severity := map[audit.Outcome]uint8{audit.Done: severityInfo, audit.Refused: severityNotice, audit.Failed: severityWarning}[e.Outcome]
	if *m.Facility != facilityAudit || *m.Severity != severity || m.Version != 1 || *m.Appname != "kmed" || m.ProcID != nil || *m.MsgID != string(e.Action) {
		t.Fatalf("the header is %+v", m)
	}
	if !m.Timestamp.Equal(e.At) {
		t.Fatalf("it is of %v, not of %v", m.Timestamp, e.At)
	}
	want := map[string]string{"log": r.Log, "leaf": fmt.Sprint(r.Leaf), "outcome": string(e.Outcome)}
	for name, value := range map[string]string{
		"role": e.Actor.Role, "actor": e.Actor.ID, "remote": e.Actor.Remote, "serial": e.Actor.Serial, "request": e.Request, "peer": e.Peer, "master": e.Master,
	} {
		if value != "" {
			want[name] = oneLine(value)
		}
	}
	if got := *m.StructuredData; len(got) != 1 || !maps.Equal(got["kme@32473"], want) {
		t.Fatalf("the structured data are %.2000q, not %.2000q", got, want)
	}
	if got := strings.TrimPrefix(*m.Message, "\ufeff"); got != string(r.Text) {
		t.Fatalf("the message is %q, not %q", got, r.Text)
	}
}

func TestSyslogIsRFC5424(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := record(12, anyEvent(t))
		text, err := Syslog(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.ContainsRune(text, '\n') {
			t.Fatalf("more than a line: %q", text)
		}
		m, err := rfc5424.NewMachine().Parse(text)
		if err != nil {
			t.Fatalf("%.300q is no message of RFC 5424: %v", text, err)
		}
		checkSyslog(t, m.(*rfc5424.SyslogMessage), r)
	})
}

// The frames of a connection are those of RFC 5425.
func TestFramesAreRFC5425(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var rows []audit.Row
		for range rapid.IntRange(1, 3).Draw(t, "rows") {
			e := anyEvent(t)
			rows = append(rows, audit.Row{Leaf: int64(len(rows)), Body: e.AppendText(nil)})
		}
		f := New(Config{Format: Syslog, Framed: true, Log: slog.New(slog.DiscardHandler)})
		text, err := f.write(Log{Name: "log/1"}, rows)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		octetcounting.NewParser(syslog.WithMaxMessageLength(1<<20), syslog.WithListener(func(r *syslog.Result) {
			if r.Error != nil {
				t.Fatalf("message %d of %d: %v", got, len(rows), r.Error)
			}
			e, err := audit.ParseEvent(rows[got].Body)
			if err != nil {
				t.Fatal(err)
			}
			checkSyslog(t, r.Message.(*rfc5424.SyslogMessage), Record{Log: "log/1", Leaf: int64(got), Text: rows[got].Body, Event: e})
			got++
		})).Parse(bytes.NewReader(text))
		if got != len(rows) {
			t.Fatalf("%d messages of %d", got, len(rows))
		}
	})
}

// A line of JSON is read alike by two parsers, of which one takes no name twice and no
// text that is not UTF-8.
func TestJSONLines(t *testing.T) {
	t.Parallel()
	type object struct {
		Log   string          `json:"log"`
		Leaf  int64           `json:"leaf"`
		Event json.RawMessage `json:"event"`
	}
	rapid.Check(t, func(t *rapid.T) {
		r := record(12, anyEvent(t))
		line, err := JSONLine(nil, r)
		if err != nil || bytes.ContainsRune(line, '\n') {
			t.Fatalf("%v: %q", err, line)
		}
		var one, other object
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&one); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if err := strict.Unmarshal(line, &other, strict.RejectUnknownMembers(true)); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		for _, got := range []object{one, other} {
			if got.Log != r.Log || got.Leaf != r.Leaf || !bytes.Equal(got.Event, r.Text) {
				t.Fatalf("%s is read as log %q, leaf %d, event %q", line, got.Log, got.Leaf, got.Event)
			}
		}
	})
}

// ocsfClasses are the schemas of the classes that are sent, by class_uid.
func ocsfClasses(t *testing.T) map[float64]*jsonschema.Schema {
	t.Helper()
	text, err := os.ReadFile("../../testdata/ocsf/1.1.0.json")
	if err != nil {
		t.Fatal(err)
	}
	whole, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	if err := c.AddResource("ocsf.json", whole); err != nil {
		t.Fatal(err)
	}
	classes := make(map[float64]*jsonschema.Schema)
	for uid, name := range map[float64]string{ocsfLifecycle: "application_lifecycle", ocsfAPIActivity: "api_activity"} {
		if classes[uid], err = c.Compile("ocsf.json#/$defs/" + name); err != nil {
			t.Fatal(err)
		}
	}
	return classes
}

// checkOCSF holds an event against the schema of its class, and what a JSON schema cannot
// say: how its numbers hang together.
func checkOCSF(classes map[float64]*jsonschema.Schema, line []byte) error {
	var o map[string]any
	if err := json.Unmarshal(line, &o); err != nil {
		return err
	}
	class, _ := o["class_uid"].(float64)
	if classes[class] == nil {
		return fmt.Errorf("class %v", o["class_uid"])
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(line))
	if err != nil {
		return err
	}
	if err := classes[class].Validate(value); err != nil {
		return err
	}
	activity := o["activity_id"].(float64)
	if o["type_uid"] != class*100+activity {
		return fmt.Errorf("type_uid %v of class %v and activity %v", o["type_uid"], class, activity)
	}
	if name, _ := o["activity_name"].(string); activity == ocsfOther && name == "" {
		return fmt.Errorf("an activity of its own has no name")
	}
	return nil
}

func TestOCSF(t *testing.T) {
	t.Parallel()
	classes := ocsfClasses(t)
	rapid.Check(t, func(t *rapid.T) {
		r := record(12, anyEvent(t))
		line, err := OCSF(nil, r)
		if err != nil || bytes.ContainsRune(line, '\n') {
			t.Fatalf("%v: %q", err, line)
		}
		if err := checkOCSF(classes, line); err != nil {
			t.Fatalf("%v\n%.1000s", err, line)
		}
		var o struct {
			RawData  string `json:"raw_data"`
			Unmapped struct{ Event json.RawMessage }
			Metadata struct{ UID string }
			Source   struct{ IP string } `json:"src_endpoint"`
		}
		if err := json.Unmarshal(line, &o); err != nil {
			t.Fatal(err)
		}
		if o.RawData != string(r.Text) && !bytes.Equal(o.Unmapped.Event, r.Text) {
			t.Fatalf("it has neither the text nor the event: %.1000s", line)
		}
		if want := fmt.Sprintf("%s#%d", r.Log, r.Leaf); o.Metadata.UID != want {
			t.Fatalf("its identity is %q, not %q", o.Metadata.UID, want)
		}
		if at, err := netip.ParseAddrPort(r.Event.Actor.Remote); err == nil && r.Event.Request != "" && o.Source.IP != at.Addr().Unmap().WithZone("").String() {
			t.Fatalf("it came from %q, not from %v", o.Source.IP, at)
		}
	})
}

// TestOCSFRefuses: the schema and the check are such that can find fault.
func TestOCSFRefuses(t *testing.T) {
	t.Parallel()
	classes := ocsfClasses(t)
	e := audit.Event{At: time.UnixMilli(1), Action: audit.EncKeys, Outcome: audit.Done, Request: "r", Actor: audit.Actor{Role: "sae", ID: "alice", Remote: "127.0.0.1:4000"}}
	line, err := OCSF(nil, record(3, e))
	if err != nil {
		t.Fatal(err)
	}
	if err := checkOCSF(classes, line); err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{
		{`"class_uid":6003`, `"class_uid":6004`},
		{`"class_uid":6003`, `"class_uid":6002`},
		{`"activity_id":99`, `"activity_id":5`},
		{`"activity_id":99`, `"activity_id":1`},
		{`"activity_name":"enc_keys",`, ``},
		{`"severity_id":1`, `"severity_id":7`},
		{`"severity_id":1,`, ``},
		{`"time":1`, `"time":"1970-01-01T00:00:00Z"`},
		{`"version":"1.1.0"`, `"version":"1.1.0","colour":"red"`},
		{`"version":"1.1.0"`, `"version":"2.0.0"`},
		{`"vendor_name":"QuteMail"`, `"vendor":"QuteMail"`},
		{`"operation":"enc_keys",`, ``},
		{`"name":"alice"`, `"full_name":"alice"`},
		{`"ip":"127.0.0.1"`, `"ip":"localhost"`},
		{`"port":4000`, `"port":70000`},
		{`"raw_data":"`, `"raw_data":"` + strings.Repeat("x", ocsfLongest)},
	} {
		changed := bytes.Replace(line, []byte(change[0]), []byte(change[1]), 1)
		if bytes.Equal(changed, line) {
			t.Fatalf("%s is not in %s", change[0], line)
		}
		if err := checkOCSF(classes, changed); err == nil {
			t.Errorf("%.80s instead of %s is taken", change[1], change[0])
		}
	}
}
