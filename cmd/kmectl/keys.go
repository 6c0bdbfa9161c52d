package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
)

// sae returns a client of the API of ETSI GS QKD 014 for the SAE that calls, and
// the SAE that it names.
func (s *session) sae(other string) (party, *etsi014.Client, identity.SAE, error) {
	p, hc, err := s.client(saeProfiles)
	if err != nil {
		return p, nil, identity.SAE{}, err
	}
	id, err := identity.ParseSAE(other)
	return p, etsi014.NewClient(p.kme, hc, p.more...), id, err
}

// unshared is the advice for a 401, which never says why.
func (p party) unshared(other string) string {
	return fmt.Sprintf("%s or %s may be unknown here, switched off, or not allowed to share keys: policies/README.md says how to grant; the KME's operators find the reason under the request ID", p.name, other)
}

type getCommand struct {
	Slave  string   `required:"" placeholder:"SAE" help:"The SAE to share the keys with."`
	Also   []string `placeholder:"SAE" help:"Further SAEs to share the same keys with, separated by commas."`
	Number int      `default:"1" help:"How many keys (${default})."`
	Size   int      `placeholder:"BITS" help:"Size of each key; the KME's default if left out."`
}

// Run gets keys and prints them.
func (c getCommand) Run(ctx context.Context, s *session) error {
	p, client, slave, err := s.sae(c.Slave)
	if err != nil {
		return err
	}
	r := etsi014.KeyRequest{Number: c.Number, Bits: c.Size}
	for _, also := range c.Also {
		id, err := identity.ParseSAE(also)
		if err != nil {
			return err
		}
		r.AdditionalSlaves = append(r.AdditionalSlaves, id)
	}
	keys, err := client.EncKeys(ctx, slave, r)
	if err != nil {
		return p.explain(err, p.unshared(c.Slave))
	}
	defer keys.Wipe()
	if err := s.printKeys(keys); err != nil || s.JSON {
		return err
	}
	fmt.Fprintf(s.stderr, "%s for %s and %s. %s takes the same with\n  kmectl --as %s take --master %s",
		count(keys), p.name, strings.Join(append([]string{c.Slave}, c.Also...), ", "), slave, slave, p.name)
	for _, k := range keys.Keys {
		fmt.Fprintf(s.stderr, " %s", k.ID)
	}
	fmt.Fprintln(s.stderr)
	return nil
}

type takeCommand struct {
	Master string   `required:"" placeholder:"SAE" help:"The SAE that got the keys."`
	KeyIDs []string `arg:"" name:"key-id" help:"IDs of the keys, as the master was told."`
}

// Run takes keys and prints them.
func (c takeCommand) Run(ctx context.Context, s *session) error {
	p, client, master, err := s.sae(c.Master)
	if err != nil {
		return err
	}
	ids := make([]key.ID, len(c.KeyIDs))
	for i, text := range c.KeyIDs {
		if ids[i], err = key.ParseID(text); err != nil {
			return advise(err, badKeyID)
		}
	}
	keys, err := client.DecKeys(ctx, master, ids)
	if answer, ok := asAPIError(err); ok && answer.Status == 400 {
		return advise(err, "a key can be taken once, by the SAE it was made for, at the KME that keeps it, while it lives: ask %s for a new one", master)
	}
	if err != nil {
		return p.explain(err, p.unshared(c.Master))
	}
	defer keys.Wipe()
	if err := s.printKeys(keys); err != nil || s.JSON {
		return err
	}
	fmt.Fprintf(s.stderr, "%s shared by %s and %s. The KME has forgotten what you took.\n", count(keys), master, p.name)
	return nil
}

type consumeCommand struct {
	KeyID string `arg:"" name:"key-id" help:"ID of the key."`
}

// Run has a key erased.
func (c consumeCommand) Run(ctx context.Context, s *session) error {
	p, hc, err := s.client(saeProfiles)
	if err != nil {
		return err
	}
	self, err := identity.ParseSAE(p.name)
	if err != nil {
		return advise(err, "name the profile of an SAE by --as: the KME is told who consumes")
	}
	id, err := key.ParseID(strings.TrimSuffix(strings.TrimSuffix(c.KeyID, "-alice"), "-bob"))
	if err != nil {
		return advise(err, badKeyID)
	}
	if err := legacy.NewClient(p.kme, hc, p.more...).ConsumeKey(ctx, self, id); err != nil {
		return p.explain(err, p.name+" may be unknown here or switched off")
	}
	_, err = fmt.Fprintf(s.stderr, "%s is erased.\n", id)
	return err
}

// badKeyID is the advice for what is no key ID.
const badKeyID = "a key ID looks like 0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11; kmectl get prints it"

// count says how many keys of what kind c holds.
func count(c etsi014.Container) string {
	first := c.Keys[0]
	s := "1 key"
	if n := len(c.Keys); n > 1 {
		s = strconv.Itoa(n) + " keys"
	}
	s += fmt.Sprintf(" of %d bits", first.Material.Bits())
	if first.Provenance != "" {
		s += " (" + string(first.Provenance) + ")"
	}
	return s
}

// printKeys prints keys as the KME sent them, or as lines. The buffer is wiped.
func (s *session) printKeys(c etsi014.Container) error {
	size := 64
	for _, k := range c.Keys {
		size += 160 + 6*len(k.Provenance) + base64.StdEncoding.EncodedLen(len(k.Material.Reveal()))
	}
	b := make([]byte, 0, size) // never outgrown: growth would leave keys behind
	if s.JSON {
		b = appendJSON(b, c)
	} else {
		b = appendLines(b, c)
	}
	defer clear(b)
	_, err := s.stdout.Write(b)
	return err
}

func appendLines(b []byte, c etsi014.Container) []byte {
	for _, k := range c.Keys {
		b, _ = k.ID.AppendText(b) // never fails
		b = append(b, ' ')
		b = base64.StdEncoding.AppendEncode(b, k.Material.Reveal())
		b = append(b, '\n')
	}
	return b
}

// appendJSON appends the Key container (014, clause 6.3).
func appendJSON(b []byte, c etsi014.Container) []byte {
	b = append(b, `{"keys":[`...)
	for i, k := range c.Keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"key_ID":"`...)
		b, _ = k.ID.AppendText(b) // never fails
		b = append(b, `","key":"`...)
		b = base64.StdEncoding.AppendEncode(b, k.Material.Reveal())
		b = append(b, '"')
		if k.Provenance != "" {
			b = append(b, `,"key_extension":{"qkm_provenance":`...)
			b, _ = jsontext.AppendQuote(b, string(k.Provenance)) // it came as a JSON string
			b = append(b, '}')
		}
		b = append(b, '}')
	}
	return append(b, "]}\n"...)
}

type statusCommand struct {
	Slave string `required:"" placeholder:"SAE" help:"The other SAE."`
}

// Run prints the status (014, clause 6.1).
func (c statusCommand) Run(ctx context.Context, s *session) error {
	p, client, slave, err := s.sae(c.Slave)
	if err != nil {
		return err
	}
	st, err := client.Status(ctx, slave)
	if err != nil {
		return p.explain(err, p.unshared(c.Slave))
	}
	if s.JSON {
		return s.printJSON(st)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s at %s, %s at %s\n", st.Master, st.SourceKME, st.Slave, st.TargetKME)
	fmt.Fprintf(&b, "  to be had now  %d keys of %d bits (the pool takes %d)\n", st.Stored, st.KeySize, st.Max)
	fmt.Fprintf(&b, "  in one request %d keys, %d to %d bits each, %d further SAEs\n", st.MaxPerRequest, st.MinSize, st.MaxSize, st.MaxSAEs)
	_, err = s.stdout.Write(b.Bytes())
	return err
}
