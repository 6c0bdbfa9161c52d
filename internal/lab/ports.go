package lab

import (
	"fmt"
	"math/rand/v2"
	"net"
)

// Ports are the TCP ports of a lab, all on localhost.
type Ports struct {
	KM1, KM2                   [4]int // SAE, assign, classical, operator
	SAECA, KMECA, OperatorCA   int
	SAECRL, KMECRL, OperatorCR int // plain HTTP: certificate revocation lists
}

// ReadmePorts are those of `make run`.
var ReadmePorts = Ports{
	KM1: [4]int{8443, 8444, 8445, 8446}, KM2: [4]int{9443, 9444, 9445, 9446},
	SAECA: 7443, KMECA: 7444, OperatorCA: 7445,
	SAECRL: 7453, KMECRL: 7454, OperatorCR: 7455,
}

// FreePorts finds ports that nobody listens on, for tests side by side.
func FreePorts() (Ports, error) {
	var ports [14]int
	for i := range ports {
		ln, err := listenAnywhere()
		if err != nil {
			return Ports{}, fmt.Errorf("finding a free port: %w", err)
		}
		defer ln.Close() // all are held until the last is found: no two alike
		ports[i] = ln.Addr().(*net.TCPAddr).Port
	}
	return Ports{
		KM1: [4]int(ports[:4]), KM2: [4]int(ports[4:8]),
		SAECA: ports[8], KMECA: ports[9], OperatorCA: ports[10],
		SAECRL: ports[11], KMECRL: ports[12], OperatorCR: ports[13],
	}, nil
}

// listenAnywhere takes a port below those that the kernel gives to outgoing
// connections, one of which might take it before its owner has come to listen.
func listenAnywhere() (net.Listener, error) {
	const first, last = 12_000, 32_000
	var err error
	for range 200 {
		var ln net.Listener
		if ln, err = net.Listen("tcp", fmt.Sprintf("localhost:%d", first+rand.IntN(last-first))); err == nil {
			return ln, nil
		}
	}
	return nil, err
}

func (p Ports) all() []int {
	return append(append(p.KM1[:], p.KM2[:]...), p.SAECA, p.KMECA, p.OperatorCA, p.SAECRL, p.KMECRL, p.OperatorCR)
}

// of are the four doors of a KME.
func (p Ports) of(kme string) [4]int {
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
