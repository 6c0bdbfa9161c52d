package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
)

// trusted are the public keys that an auditor was given.
type trusted struct {
	Vkey    string   `name:"vkey" placeholder:"KEY" help:"The log's verifier key, from somebody you trust."`
	Witness []string `name:"witness" placeholder:"KEY" help:"The verifier key of a witness; all that are given must have signed. Repeatable."`
}

// keys reads them. Without the log's key the one that the log itself names is taken,
// which proves that the log hangs together, and not whose it is.
func (t trusted) keys(s *session, named string) (key audit.LogKey, witnesses []audit.Witness, err error) {
	if t.Vkey == "" {
		fmt.Fprintf(s.stderr, "kmectl: no --vkey: taking the key that the log names itself, %s\n", printable(named))
	}
	return t.readKeys(named)
}

// readKeys is keys of whoever says himself what was not given.
func (t trusted) readKeys(named string) (key audit.LogKey, witnesses []audit.Witness, err error) {
	if key, err = audit.ParseLogKey(cmp.Or(t.Vkey, named)); err != nil {
		return key, nil, err
	}
	for _, text := range t.Witness {
		w, err := audit.NewWitness(text)
		if err != nil {
			return key, nil, err
		}
		witnesses = append(witnesses, w)
	}
	return key, witnesses, nil
}

// cosignedByAll says whether all witnesses that were asked for have signed.
func cosignedByAll(names []string, witnesses []audit.Witness) error {
	for _, w := range witnesses {
		if !strings.Contains("\n"+strings.Join(names, "\n")+"\n", "\n"+w.Name()+"\n") {
			return fmt.Errorf("witness %s has not signed the checkpoint", w.Name())
		}
	}
	return nil
}

// namedKey asks for the key that the log of an origin (0: the present one) names, if none
// was given.
func namedKey(ctx context.Context, client *admin.Client, t trusted, origin int64) (named string, err error) {
	if t.Vkey != "" {
		return "", nil
	}
	trail, err := client.Trail(ctx)
	for _, l := range trail.Logs {
		if origin == 0 || l.Origin == origin {
			named = l.Key
		}
	}
	return named, err
}

// print verifies a proof and prints its event.
func (t trusted) print(s *session, proof audit.Proof, named string) error {
	key, witnesses, err := t.keys(s, named)
	if err != nil {
		return err
	}
	_, c, names, err := proof.Verify(key, witnesses...)
	if err == nil {
		err = cosignedByAll(names, witnesses)
	}
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(s.stdout, proof.Text); err != nil {
		return err
	}
	fmt.Fprintf(s.stderr, "proved: leaf %d of %d of %s%s\n", proof.Leaf, c.Size, c.Origin, signedBy(names))
	return nil
}

func signedBy(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return ", signed by " + strings.Join(names, " and ")
}

type proveCommand struct {
	Leaf   int64  `arg:"" help:"The event's number in the log."`
	Origin int64  `help:"Of the log of this origin (the present one)."`
	Out    string `default:"-" placeholder:"FILE" help:"Where to write it (standard output)."`
	Bundle string `type:"existingfile" placeholder:"FILE" help:"Make it of this bundle, and ask no KME: of an event that left the database with its day. The KME says which bundle that is."`
}

// proof asks a KME for it, or makes it of a bundle.
func (c proveCommand) proof(ctx context.Context, s *session) (audit.Proof, error) {
	if c.Bundle == "" {
		p, client, err := s.operator()
		if err != nil {
			return audit.Proof{}, err
		}
		proof, err := client.Proof(ctx, c.Origin, c.Leaf)
		if err != nil {
			return proof, p.explain(err, p.unlisted())
		}
		return proof, nil
	}
	b, f, err := audit.OpenBundleFile(c.Bundle)
	if err != nil {
		return audit.Proof{}, err
	}
	defer func() { _ = f.Close() }() // it was only read
	key, err := audit.ParseLogKey(b.Key)
	if err != nil {
		return audit.Proof{}, err
	}
	return b.Prove(c.Leaf, key)
}

// Run writes a proof.
func (c proveCommand) Run(ctx context.Context, s *session) error {
	proof, err := c.proof(ctx, s)
	if err != nil {
		return err
	}
	text, err := json.Marshal(proof)
	if err != nil {
		return err
	}
	if c.Out == "-" {
		_, err = fmt.Fprintf(s.stdout, "%s\n", text)
		return err
	}
	return os.WriteFile(c.Out, append(text, '\n'), 0o644)
}

type checkCommand struct {
	trusted
	File string `arg:"" type:"existingfile" help:"The proof."`
}

// Run verifies a proof.
func (c checkCommand) Run(s *session) error {
	if c.Vkey == "" {
		return errors.New("--vkey is missing: a proof says nothing without the log's key")
	}
	text, err := os.ReadFile(c.File)
	if err != nil {
		return err
	}
	proof, err := audit.ParseProof(text)
	if err != nil {
		return err
	}
	return c.print(s, proof, "")
}

type exportCommand struct {
	Out    string `arg:"" help:"The file to write."`
	Origin int64  `help:"The log of this origin (the present one)."`
	First  int64  `help:"From this leaf on."`
	End    int64  `help:"Up to, and without, this leaf (all, and what is not in the log yet)."`
}

// Run writes a bundle.
func (c exportCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(c.Out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(client.Bundle(ctx, f, c.Origin, c.First, c.End), f.Close())
	if err != nil {
		return errors.Join(p.explain(err, p.unlisted()), os.Remove(c.Out))
	}
	return nil
}

type verifyCommand struct {
	trusted
	Offline string `type:"existingfile" placeholder:"FILE" help:"Verify this bundle, and ask no KME."`
	Part    bool   `help:"The bundle may be of a part of the log."`
	Origin  int64  `help:"The log of this origin (the present one)."`
	Archive string `type:"existingdir" placeholder:"DIR" help:"Verify the bundles of archived days in this folder, too, and that from the log's first event on none is missing."`
	Later   string `type:"existingfile" placeholder:"FILE" help:"A bundle of a later log of the site, which says where archived days of this one went. Without --offline the KME is asked for it."`
	Also    string `placeholder:"URL" help:"Ask the operator door of the other KME what it has witnessed of this log."`
	Head    string `placeholder:"NODE:EVENT:HASH" help:"A head of a node's chain that is known from elsewhere, such as an alarm of the other KME; the hash in hex."`
}

// Run verifies the log. Its error names the first event that is not as it was recorded.
func (c verifyCommand) Run(ctx context.Context, s *session) error {
	seen, err := c.witnessed(ctx, s) // before the log is read, which may have grown when it is
	if err != nil {
		return err
	}
	f, err := s.fetch(ctx, c.Offline, "", c.Origin)
	if err != nil {
		return err
	}
	defer f.close()
	key, witnesses, err := c.keys(s, f.bundle.Key)
	if err != nil {
		return err
	}
	known, err := c.known(seen, key)
	if err == nil {
		known.Archived, err = c.later(ctx, s, key)
	}
	if err != nil {
		return err
	}
	r, cp, names, err := audit.VerifyBundle(ctx, key, witnesses, known, !c.Part, f.bundle)
	if err == nil {
		err = cosignedByAll(names, witnesses)
	}
	if err != nil {
		return err
	}
	signed := signedBy(names)
	if r.Cosigned < cp.Size {
		signed += fmt.Sprintf(" as it had %d", r.Cosigned)
	}
	which := fmt.Sprintf("leaves %d to %d", r.First, r.First+r.Leaves-1)
	if r.Leaves == 0 {
		which = "no leaves, since all are in bundles,"
	}
	_, err = fmt.Fprintf(s.stdout, "verified: %s of %s, whose checkpoint has %d%s; %d events beyond it, signed by their nodes\n", which, cp.Origin, cp.Size, signed, r.Tail)
	for _, a := range slices.Concat(r.Archived, known.Archived) {
		fmt.Fprintf(s.stdout, "leaves %d to %d of %s are in %s, SHA-256 %x\n", a.First, a.Last, printable(a.Log), printable(a.File), a.Sum)
	}
	if r.First > 0 { // the event that names them may be in another bundle
		known.Earlier = nil
	}
	err = errors.Join(err, sayFollows(s.stdout, r.Follows, known.Earlier))
	if err == nil && c.Archive != "" {
		err = c.verifyArchive(ctx, s, key, r)
	}
	return err
}

// later is where days of an earlier log of a site went, as a later one says: the events that
// say so are in the log that was the present one then.
func (c verifyCommand) later(ctx context.Context, s *session, key audit.LogKey) ([]audit.Archived, error) {
	if c.Later == "" && (c.Offline != "" || c.Origin == 0) {
		return nil, nil
	}
	f, err := s.fetch(ctx, c.Later, "", 0)
	if err != nil {
		return nil, err
	}
	defer f.close()
	later, err := audit.ParseLogKey(f.bundle.Key)
	if err != nil || later.Name() == key.Name() {
		return nil, err
	}
	if later.Site != key.Site || !later.SamePublic(key) {
		fmt.Fprintf(s.stderr, "kmectl: what %s says of %s is not believed: it has another key\n", printable(later.Name()), printable(key.Name()))
		return nil, nil
	}
	r, _, _, err := audit.VerifyBundle(ctx, later, nil, audit.Known{}, true, f.bundle)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", later.Name(), err)
	}
	return slices.DeleteFunc(r.Archived, func(a audit.Archived) bool { return a.Log != key.Name() }), nil
}

// verifyArchive verifies the bundles that have the leaves before those that were verified,
// back to the first. The chain of each node must lead from each bundle to the next: so what
// is verified of the last holds for all before it.
func (c verifyCommand) verifyArchive(ctx context.Context, s *session, key audit.LogKey, r audit.Report) error {
	names, err := filepath.Glob(filepath.Join(c.Archive, "*.bundle"))
	if err != nil {
		return err
	}
	first, heads, used := r.First, r.Begins, 0
	for first > 0 {
		var found bool
		bad := error(&audit.BadLeaf{Leaf: first - 1, Why: "no bundle in " + c.Archive + " has it"})
		for _, name := range names {
			part, err := verifyPart(ctx, name, key, first-1, heads)
			if errors.Is(err, errNotIn) {
				continue
			}
			if err != nil { // it may be in another one, that was written after a restore
				bad = fmt.Errorf("%s: %w", name, err)
				continue
			}
			first, found, used = part.First, true, used+1
			maps.Copy(heads, part.Begins)
			break
		}
		if !found {
			return bad
		}
	}
	_, err = fmt.Fprintf(s.stdout, "verified: all leaves before %d, in %d bundles\n", r.First, used)
	return err
}

// errNotIn says that a bundle is of other leaves.
var errNotIn = errors.New("the bundle does not have the leaf")

// verifyPart verifies a bundle that has a leaf, and that the chains of nodes come to heads.
func verifyPart(ctx context.Context, name string, key audit.LogKey, leaf int64, heads map[string]audit.Head) (r audit.Report, err error) {
	b, f, err := audit.OpenBundleFile(name)
	if err != nil {
		return r, err
	}
	defer func() { _ = f.Close() }() // it was only read
	if _, _, err := audit.OpenCheckpoint(b.Signed, key); err != nil || leaf < b.First || leaf >= b.First+b.Leaves {
		return r, errNotIn // it may be of another log
	}
	r, _, _, err = audit.VerifyBundle(ctx, key, nil, audit.Known{Heads: heads}, false, b)
	return r, err
}

// sayFollows says which logs a log names that a recovery has begun, and which it does not
// name though a witness has seen them: the witness was away at the recovery, or what it
// had seen was left out.
func sayFollows(out io.Writer, follows, earlier []audit.Checkpoint) error {
	var errs []error
	for _, c := range follows {
		_, err := fmt.Fprintf(out, "it follows %s, of which a witness had seen %d leaves\n", c.Origin, c.Size)
		errs = append(errs, err)
	}
	for _, c := range earlier {
		if !slices.ContainsFunc(follows, func(f audit.Checkpoint) bool { return f.Origin == c.Origin }) {
			_, err := fmt.Fprintf(out, "it does not name %s, of which a witness has seen %d leaves\n", c.Origin, c.Size)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// witnessed asks the other KME what it has seen of logs.
func (c verifyCommand) witnessed(ctx context.Context, s *session) ([]admin.Witnessed, error) {
	if c.Also == "" {
		return nil, nil
	}
	other := *s
	other.KME = []string{c.Also}
	p, client, err := other.operator()
	if err != nil {
		return nil, err
	}
	t, err := client.Trail(ctx)
	if err != nil {
		return nil, p.explain(err, p.unlisted())
	}
	return t.Witnessed, nil
}

// known gathers what is known from elsewhere.
func (c verifyCommand) known(seen []admin.Witnessed, key audit.LogKey) (k audit.Known, err error) {
	if c.Head != "" {
		var h audit.Head
		parts := strings.Split(c.Head, ":")
		if len(parts) == 3 {
			var hash []byte
			hash, err = hex.DecodeString(parts[2])
			_, serr := fmt.Sscan(parts[1], &h.Seq)
			if err = errors.Join(err, serr); err == nil && len(hash) == len(h.Hash) {
				h.Hash = [32]byte(hash)
				k.Heads = map[string]audit.Head{parts[0]: h}
			}
		}
		if k.Heads == nil {
			return k, fmt.Errorf("--head %q is not NODE:EVENT:HASH", c.Head)
		}
	}
	if c.Also == "" {
		return k, nil
	}
	for _, w := range seen {
		if earlier, err := key.OpenEarlier(w.Checkpoint); err == nil {
			k.Earlier = append(k.Earlier, earlier)
		}
		if w.Log != key.Name() {
			continue
		}
		cp, _, err := audit.OpenCheckpoint([]byte(w.Checkpoint), key)
		if err != nil {
			return k, fmt.Errorf("what %s has witnessed: %w", c.Also, err)
		}
		k.Checkpoints = append(k.Checkpoints, cp)
	}
	if len(k.Checkpoints) == 0 {
		return k, fmt.Errorf("%s has witnessed nothing of %s", c.Also, key.Name())
	}
	return k, nil
}

// fetched is a bundle in a file.
type fetched struct {
	bundle *audit.Bundle
	file   *os.File
	temp   bool
}

func (f fetched) close() {
	_ = f.file.Close()
	if f.temp {
		_ = os.Remove(f.file.Name())
	}
}

// fetch opens a bundle, or asks a KME for one of the whole log: the one of the profile,
// or that at url.
func (s *session) fetch(ctx context.Context, file, url string, origin int64) (f fetched, err error) {
	if file != "" {
		f.bundle, f.file, err = audit.OpenBundleFile(file)
		return f, err
	}
	at := *s
	if url != "" {
		at.KME = []string{url}
	}
	p, client, err := at.operator()
	if err != nil {
		return f, err
	}
	if f.file, err = os.CreateTemp("", "kmectl-bundle-"); err != nil {
		return f, err
	}
	f.temp = true
	err = client.Bundle(ctx, f.file, origin, 0, 0)
	if err != nil {
		err = p.explain(err, p.unlisted())
	} else if _, err = f.file.Seek(0, io.SeekStart); err == nil {
		f.bundle, err = audit.OpenBundle(f.file)
	}
	if err != nil {
		f.close()
	}
	return f, err
}

type reconcileCommand struct {
	A        string   `arg:"" help:"A bundle of the log of the one KME, or the URL of its operator door."`
	B        string   `arg:"" help:"The same of the other, taken after it."`
	VkeyA    string   `name:"vkey-a" placeholder:"KEY" help:"The verifier key of A's log, from somebody you trust."`
	VkeyB    string   `name:"vkey-b" placeholder:"KEY" help:"The same of B's."`
	WitnessA []string `name:"witness-a" placeholder:"KEY" help:"The verifier key of a witness of A's log; all that are given must have signed. Repeatable."`
	WitnessB []string `name:"witness-b" placeholder:"KEY" help:"The same of B's."`
}

// sides are the keys that were given for each log.
func (c reconcileCommand) sides() [2]trusted {
	return [2]trusted{{c.VkeyA, c.WitnessA}, {c.VkeyB, c.WitnessB}}
}

// Run compares two logs. Each is verified before it is believed: by the key that was given
// for it, or by the one that it names itself, which proves of neither site that it is it.
func (c reconcileCommand) Run(ctx context.Context, s *session) error {
	var accounts [2]*audit.Account
	var names [2]string
	sides := c.sides()
	for i, from := range []string{c.A, c.B} {
		file, url := from, ""
		if strings.HasPrefix(from, "https://") {
			file, url = "", from
		}
		f, err := s.fetch(ctx, file, url, 0)
		if err != nil {
			return err
		}
		defer f.close()
		key, witnesses, err := sides[i].readKeys(f.bundle.Key)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		_, _, signed, err := audit.VerifyBundle(ctx, key, witnesses, audit.Known{}, true, f.bundle)
		if err == nil {
			err = cosignedByAll(signed, witnesses)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		names[i] = key.Name()
		accounts[i] = audit.NewAccount()
		add := func(r audit.Row) error {
			e, err := audit.ParseEvent(r.Body)
			accounts[i].Add(e)
			return err
		}
		if err := errors.Join(f.bundle.Rows(ctx, 0, 1<<62, add), f.bundle.Tail(ctx, add)); err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
	}
	if names[0] == names[1] {
		return fmt.Errorf("%s and %s are of one log, %s: there is nothing to compare", c.A, c.B, names[0])
	}
	findings := audit.Reconcile(accounts[0], accounts[1])
	for _, f := range findings {
		fmt.Fprintln(s.stdout, printable(f))
	}
	if len(findings) > 0 {
		return fmt.Errorf("%d findings", len(findings))
	}
	_, err := fmt.Fprintf(s.stdout, "%s and %s agree: %d and %d requests, %d and %d keys given to masters, %d and %d to slaves; for these the HSMs have opened %d and %d blobs\n",
		accounts[0].Site, accounts[1].Site, accounts[0].Requests(), accounts[1].Requests(), accounts[0].Served(), accounts[1].Served(),
		accounts[0].Taken(), accounts[1].Taken(), accounts[0].Opened(), accounts[1].Opened())
	for i, side := range sides {
		if side.Vkey == "" {
			fmt.Fprintf(s.stdout, "NOT CHECKED: whose log %s is. It was verified with the key that it names itself: give --vkey-%c\n", printable(names[i]), 'a'+i)
		}
	}
	return err
}
