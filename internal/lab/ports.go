package lab

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
)

// Ports are the TCP ports of a lab, all on localhost.
type Ports struct {
	KM1, KM2                   [][4]int // of each node: SAE, assign, classical, operator
	SAECA, KMECA, OperatorCA   int
	SAECRL, KMECRL, OperatorCR int // plain HTTP: certificate revocation lists
}

// ReadmePorts are those of `make run`, for so many nodes a site.
func ReadmePorts(nodes int) Ports {
	p := Ports{
		SAECA: 7443, KMECA: 7444, OperatorCA: 7445,
		SAECRL: 7453, KMECRL: 7454, OperatorCR: 7455,
	}
	for i := range nodes {
		p.KM1 = append(p.KM1, [4]int{8443 + 10*i, 8444 + 10*i, 8445 + 10*i, 8446 + 10*i})
		p.KM2 = append(p.KM2, [4]int{9443 + 10*i, 9444 + 10*i, 9445 + 10*i, 9446 + 10*i})
	}
	return p
}

// FreePorts finds ports that nobody listens on, for tests side by side.
func FreePorts(nodes int) (Ports, error) {
	ports := make([]int, 6+8*nodes)
	for i := range ports {
		ln, err := listenAnywhere()
		if err != nil {
			return Ports{}, err
		}
		ports[i] = ln.Addr().(*net.TCPAddr).Port
		if err := ln.Close(); err != nil {
			return Ports{}, fmt.Errorf("finding a free port: %w", err)
		}
	}
	p := Ports{
		SAECA: ports[0], KMECA: ports[1], OperatorCA: ports[2],
		SAECRL: ports[3], KMECRL: ports[4], OperatorCR: ports[5],
	}
	for doors := range slices.Chunk(ports[6:], 8) {
		p.KM1, p.KM2 = append(p.KM1, [4]int(doors[:4])), append(p.KM2, [4]int(doors[4:]))
	}
	return p, nil
}

// portRange is a part of the machine's ports that this process has for itself among all
// that look for free ones: a port is looked for long before its owner listens on it, and
// again whenever that starts anew. All lie below those that the kernel gives to outgoing
// connections, one of which might take it meanwhile.
type portRange struct {
	first int
	taken atomic.Int64 // ports that were given out, again from the first on when all were
	mark  net.Listener // while it is open the range is this process's: the kernel ends it with the process
}

const rangePorts = 1000

var reserved = sync.OnceValues(func() (*portRange, error) {
	const first, last = 12_000, 32_000
	for at := first; at < last; at += rangePorts {
		if mark, err := net.Listen("unix", fmt.Sprintf("@kme-lab-ports-%d", at)); err == nil {
			return &portRange{first: at, mark: mark}, nil
		}
	}
	return nil, errors.New("finding free ports: too many processes look for them")
})

// listenAnywhere takes the next port of this process's range that nobody listens on.
func listenAnywhere() (net.Listener, error) {
	r, err := reserved()
	if err != nil {
		return nil, err
	}
	for range rangePorts {
		var ln net.Listener
		port := r.first + int((r.taken.Add(1)-1)%rangePorts)
		if ln, err = net.Listen("tcp", fmt.Sprintf("localhost:%d", port)); err == nil {
			return ln, nil
		}
	}
	return nil, fmt.Errorf("finding a free port: %w", err)
}

// shipped are those that a shipped file may name: there each KME has one node.
func (p Ports) shipped() []int {
	return append(slices.Concat(p.KM1[0][:], p.KM2[0][:]), p.SAECA, p.KMECA, p.OperatorCA, p.SAECRL, p.KMECRL, p.OperatorCR)
}

// of are the doors of a KME's nodes.
func (p Ports) of(kme string) [][4]int {
	if kme == "km1" {
		return p.KM1
	}
	return p.KM2
}

// ca is the address of a role's CA.
func (p Ports) ca(role string) int {
	return map[string]int{"sae": p.SAECA, "kme": p.KMECA, "operator": p.OperatorCA}[role]
}

func (p Ports) crl(role string) int {
	return map[string]int{"sae": p.SAECRL, "kme": p.KMECRL, "operator": p.OperatorCR}[role]
}
