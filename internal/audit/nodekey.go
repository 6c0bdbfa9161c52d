package audit

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"github.com/qutemail/kme/internal/secretfile"
)

// NodeKey is the key with which a node signs the head of its chain in each commit. It
// lies in the node's data folder and never in the database: whoever rewrites rows
// there, even such as the tree has not seen yet, cannot sign them.
type NodeKey struct{ private ed25519.PrivateKey }

// maxNodeKey is far above what the file holds, in bytes.
const maxNodeKey = 4096

// OpenNodeKey reads the key from a file, and makes both if the file is missing. It
// refuses a file that others than its owner may read.
func OpenNodeKey(path string) (*NodeKey, error) {
	text, err := secretfile.Source{File: path}.Read(maxNodeKey)
	if errors.Is(err, fs.ErrNotExist) {
		return makeNodeKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the node's audit key: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("opening the node's audit key: %s is no PEM", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	private, ok := parsed.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("opening the node's audit key: %s holds no Ed25519 key (error %w)", path, err)
	}
	return &NodeKey{private}, nil
}

// makeNodeKey writes a new key. The name is taken when it is whole: after a crash there
// is a key or none.
func makeNodeKey(path string) (*NodeKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the node's audit key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("making the node's audit key: %w", err)
	}
	if err := writeNew(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return nil, fmt.Errorf("making the node's audit key: %w", err)
	}
	return &NodeKey{private}, nil
}

func writeNew(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Public is the key's public half.
func (k *NodeKey) Public() ed25519.PublicKey { return k.private.Public().(ed25519.PublicKey) }

// Sign signs the head of a node's chain.
func (k *NodeKey) Sign(node string, h Head) []byte {
	return ed25519.Sign(k.private, headStatement(node, h))
}

// VerifyHead says whether sig is the signature of node's key over h.
func VerifyHead(public ed25519.PublicKey, node string, h Head, sig []byte) bool {
	return len(public) == ed25519.PublicKeySize && ed25519.Verify(public, headStatement(node, h), sig)
}

// headStatement is what is signed: the name of the statement, the node with its
// length, the number of the chain's last event and the hash after it.
func headStatement(node string, h Head) []byte {
	b := append(make([]byte, 0, 128), "kme/audit-head/1\x00"...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(node)))
	b = append(b, node...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.Seq))
	return append(b, h.Hash[:]...)
}

// keyNotePrefix is the first line of a key note. No checkpoint begins so.
const keyNotePrefix = "kme/audit-node-key/1"

// SignNodeKey has the log's key vouch for a node's: the note that it returns stands in
// the event that starts a run of the node.
func SignNodeKey(log note.Signer, node string, public ed25519.PublicKey) (string, error) {
	text := strings.Join([]string{keyNotePrefix, log.Name(), node, base64.StdEncoding.EncodeToString(public)}, "\n") + "\n"
	signed, err := note.Sign(&note.Note{Text: text}, log)
	if err != nil {
		return "", fmt.Errorf("vouching for the audit key of node %s: %w", node, err)
	}
	return string(signed), nil
}

// OpenNodeKeyNote returns the key that the log's key vouches for as that of node.
func OpenNodeKeyNote(signed string, log note.Verifier, node string) (ed25519.PublicKey, error) {
	n, err := note.Open([]byte(signed), note.VerifierList(log))
	if err != nil {
		return nil, fmt.Errorf("the audit key of node %s: %w", node, err)
	}
	lines := strings.Split(n.Text, "\n")
	if len(lines) != 5 || lines[0] != keyNotePrefix || lines[1] != log.Name() || lines[2] != node || lines[4] != "" {
		return nil, fmt.Errorf("the audit key of node %s: the note is of something else", node)
	}
	public, err := base64.StdEncoding.Strict().DecodeString(lines[3])
	if err != nil || len(public) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("the audit key of node %s: %.60q is none", node, lines[3])
	}
	return public, nil
}
