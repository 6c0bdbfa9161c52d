package lab

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/qlink"
)

// Fibre is a quantum channel between the sites: a qlink of its own for each link.
type Fibre struct {
	lab   *Lab
	Link  string // the ID of the link
	dir   string // of its sockets and secrets
	qlink *process
}

// linkID is the ID of the first link, which every lab has.
const linkID = "km1-km2"

// fibre is the i-th quantum channel.
func (l *Lab) fibre(i int) *Fibre {
	f := &Fibre{lab: l, Link: linkID, dir: l.path("qlink")}
	if i > 0 {
		f.Link, f.dir = fmt.Sprintf("%s-%d", linkID, i+1), fmt.Sprintf("%s-%d", f.dir, i+1)
	}
	return f
}

// Tell speaks to the quantum channel: "eve 0.5", "cut", "mend", "status".
func (f *Fibre) Tell(ctx context.Context, command string) (string, error) {
	return qlink.Command(ctx, f.ControlSocket(), command)
}

// ControlSocket is where the quantum channel takes commands.
func (f *Fibre) ControlSocket() string { return filepath.Join(f.Sockets(), "control.sock") }

// Stop stops the quantum channel, and Kill kills it: for tests of what the KMEs do
// without one.
func (f *Fibre) Stop() error { return f.qlink.stop() }

// Kill ends the quantum channel with SIGKILL.
func (f *Fibre) Kill() { f.qlink.kill() }

// Start starts the quantum channel.
func (f *Fibre) Start(ctx context.Context) error {
	for _, name := range []string{"alice", "bob"} { // of either end
		if err := secretFile(filepath.Join(f.dir, name+".secret")); err != nil {
			return err
		}
	}
	sockets, err := f.socketFolder()
	if err != nil {
		return err
	}
	config := filepath.Join(f.dir, "qlink.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, qlinkYAML, sockets, f.lab.Eve), 0o600); err != nil {
		return err
	}
	f.qlink, err = f.lab.nursery.start(filepath.Base(f.dir), f.dir, filepath.Join(f.dir, "log"), nil, filepath.Join(f.lab.Bin, "qlink"), "serve", "--config", config)
	if err != nil {
		return err
	}
	return f.qlink.await(ctx, func() error {
		_, err := f.Tell(ctx, "status")
		return err
	})
}

// qlinkYAML is the configuration of a lab's qlink, of the folder of the sockets and Eve.
const qlinkYAML = `# Written by the lab at each start.
alice: {socket: "%[1]s/alice.sock", secret_file: alice.secret}
bob: {socket: "%[1]s/bob.sock", secret_file: bob.secret}
control: "%[1]s/control.sock"
eve: %[2]g
`

// SecretFile has the secret that both ends of the link share.
func (f *Fibre) SecretFile() string { return filepath.Join(f.dir, "link.secret") }

// prepareSecret makes the folder and in it the secret that both ends of the link share.
// KM1 reads it from the file; KM2 has it in its token.
func (f *Fibre) prepareSecret() error {
	if _, err := os.Stat(f.SecretFile()); err == nil {
		return nil
	}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	secret := make([]byte, hsm.AuthSecretBytes)
	_, _ = rand.Read(secret) // never fails: it ends the process instead
	return os.WriteFile(f.SecretFile(), secret, 0o600)
}

// BoxSecret is the file that opens an end of the quantum channel.
func (f *Fibre) BoxSecret(end string) string { return filepath.Join(f.dir, end+".secret") }

// Sockets is a name of the folder of the quantum channel's sockets that is short
// enough: a socket's path may not be longer than 107 bytes.
func (f *Fibre) Sockets() string {
	if len(f.dir) < 90 {
		return f.dir
	}
	sum := sha256.Sum256([]byte(f.dir))
	return filepath.Join(os.TempDir(), "kme-lab-"+hex.EncodeToString(sum[:6]))
}

// socketFolder makes that name, if it is not the folder itself.
func (f *Fibre) socketFolder() (string, error) {
	name := f.Sockets()
	if name == f.dir {
		return name, nil
	}
	if target, err := os.Readlink(name); err == nil && target == f.dir {
		return name, nil
	}
	if err := os.Symlink(f.dir, name); err != nil {
		return "", fmt.Errorf("making a short name for the sockets: %w", err)
	}
	return name, nil
}
