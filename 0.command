git clone URL visitas
