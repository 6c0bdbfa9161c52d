package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/qutemail/kme/pki"
)

// The folders of profiles. One profile is a folder with cert.pem, key.pem and
// profile.yaml; root.pem lies in it or beside the folders of all.
const (
	saeProfiles      = "saes"
	operatorProfiles = "operators"
)

// profile is a profile.yaml.
type profile struct {
	KME urls `yaml:"kme"` // the URL of the door, such as https://localhost:8443, or a list: one a node
}

// urls are one or several.
type urls []string

// UnmarshalYAML reads one, or a list.
func (u *urls) UnmarshalYAML(text []byte) error {
	var one string
	if err := yaml.Unmarshal(text, &one); err == nil {
		*u = urls{one}
		return nil
	}
	return yaml.Unmarshal(text, (*[]string)(u))
}

// party is who calls whom: files, not yet read, and a URL.
type party struct {
	cert, key, ca string
	kme           string
	more          []string // other nodes of that KME
	name          string   // what the certificate calls its holder
}

// client returns an HTTP client that speaks as the party the flags name. kind is
// the folder of the profiles that fit the command.
func (s *session) client(kind string) (party, *http.Client, error) {
	p, err := s.party(kind)
	if err != nil {
		return p, nil, err
	}
	if p.kme == "" {
		return p, nil, advise(errors.New("no KME is named"), "give its door's address by --kme, such as --kme https://localhost:8443")
	}
	for _, url := range append([]string{p.kme}, p.more...) {
		if !strings.HasPrefix(url, "https://") {
			return p, nil, advise(fmt.Errorf("the KME's address %q is not https", url), "keys travel over mutual TLS only: --kme https://HOST:PORT")
		}
	}
	config, err := p.tls(time.Now())
	if err != nil {
		return p, nil, err
	}
	p.name = config.Certificates[0].Leaf.Subject.CommonName
	// HTTP/1.1: there is one request at a time, and HTTP/2 hides why a handshake failed.
	return p, &http.Client{Timeout: s.Timeout, Transport: &http.Transport{TLSClientConfig: config}}, nil
}

// party finds the files: those of the flags, or those of a profile.
func (s *session) party(kind string) (party, error) {
	p := party{cert: s.Cert, key: s.Key, ca: s.CA}
	p.at(s.KME)
	if s.As == "" && (p.cert != "" || p.key != "") {
		if p.cert == "" || p.key == "" || p.ca == "" {
			return p, advise(errors.New("a certificate needs its key and the KME's root"), "give all of --cert, --key and --ca, or --as NAME")
		}
		return p, nil
	}
	if s.As != "" && (p.cert != "" || p.key != "") {
		return p, advise(errors.New("--as names a certificate already"), "give --as NAME, or --cert and --key")
	}
	name, err := s.profileName(kind)
	if err != nil {
		return p, err
	}
	dir := filepath.Join(s.Profiles, kind, name)
	p.cert, p.key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if p.ca == "" {
		p.ca = filepath.Join(dir, "root.pem")
		if _, err := os.Stat(p.ca); err != nil {
			p.ca = filepath.Join(s.Profiles, "root.pem")
		}
	}
	if p.kme == "" {
		var found []string
		found, err = readProfile(filepath.Join(dir, "profile.yaml"))
		p.at(found)
	}
	return p, err
}

// at sets where the KME's nodes are.
func (p *party) at(urls []string) {
	if len(urls) > 0 {
		p.kme, p.more = urls[0], urls[1:]
	}
}

// profileName is the name that --as gives. An operator needs none where there is
// one profile only.
func (s *session) profileName(kind string) (string, error) {
	found := s.profileNames(kind)
	has := strings.Join(found, ", ")
	if has == "" {
		has = "none"
	}
	where := filepath.Join(s.Profiles, kind)
	switch {
	case s.As == "" && kind == operatorProfiles && len(found) == 1:
		return found[0], nil
	case s.As == "":
		return "", advise(errors.New("who are you?"), "say --as NAME (profiles in %s: %s), or --cert, --key and --ca", where, has)
	}
	for _, name := range found {
		if name == s.As {
			return name, nil
		}
	}
	return "", advise(fmt.Errorf("there is no profile %s", filepath.Join(where, s.As)),
		"profiles there: %s. The lab (make run) makes them in ./.lab; --profiles names another folder", has)
}

func (s *session) profileNames(kind string) []string {
	entries, err := os.ReadDir(filepath.Join(s.Profiles, kind))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(s.Profiles, kind, e.Name(), "cert.pem")); err == nil {
			names = append(names, e.Name())
		}
	}
	return names
}

func readProfile(file string) ([]string, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the profile: %w", err)
	}
	var p profile
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(&p); err != nil {
		return nil, advise(fmt.Errorf("reading %s: %s", file, yaml.FormatError(err, false, false)), "it should say kme: https://HOST:PORT")
	}
	return p.KME, nil
}

// tls reads the party's files.
func (p party) tls(now time.Time) (*tls.Config, error) {
	info, err := os.Stat(p.key)
	if err != nil {
		return nil, fmt.Errorf("reading the private key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, advise(fmt.Errorf("others can read the private key %s", p.key), "chmod 600 %s", p.key)
	}
	cert, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate %s and its key: %w", p.cert, err)
	}
	if now.After(cert.Leaf.NotAfter) {
		return nil, advise(fmt.Errorf("the certificate %s ended at %s", p.cert, cert.Leaf.NotAfter.UTC().Format(time.RFC3339)),
			"get a new one: make run does so for the lab's people, step ca certificate for others")
	}
	roots, err := pki.LoadPool(p.ca)
	if err != nil {
		return nil, advise(fmt.Errorf("reading the KME's root: %w", err), "name the file by --ca")
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{cert}}, nil
}
